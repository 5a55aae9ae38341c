"""The student's few-step sampler."""

from .scheduling_rdm import RdmScheduler
from .transitions import RdmSchedulerOutput

__all__ = ["RdmScheduler", "RdmSchedulerOutput"]
