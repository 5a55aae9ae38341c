"""The student's few-step sampler."""

from .grids import shifted, stretched
from .scheduling_rdm import RdmScheduler
from .transitions import RdmSchedulerOutput

__all__ = ["RdmScheduler", "RdmSchedulerOutput", "shifted", "stretched"]
