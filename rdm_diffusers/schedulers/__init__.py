"""The student's few-step sampler."""

from .scheduling_rdm import RdmScheduler, RdmSchedulerOutput

__all__ = ["RdmScheduler", "RdmSchedulerOutput"]
