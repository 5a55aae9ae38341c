"""The student's few-step sampler."""

from .output import RdmSchedulerOutput
from .scheduling_rdm import RdmScheduler

__all__ = ["RdmScheduler", "RdmSchedulerOutput"]
