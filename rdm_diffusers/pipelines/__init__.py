"""Sampling students."""

from .pipeline_rdm import RdmDistillationPipeline, RdmStableDiffusion3Pipeline, RdmStableDiffusionPipeline
from .student_config import STUDENT_CONFIG, StudentConfig

__all__ = [
    "STUDENT_CONFIG",
    "RdmDistillationPipeline",
    "RdmStableDiffusion3Pipeline",
    "RdmStableDiffusionPipeline",
    "StudentConfig",
]
