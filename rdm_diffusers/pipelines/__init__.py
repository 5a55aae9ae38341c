"""Sampling students."""

from .pipeline_rdm import RdmDistillationPipeline, RdmStableDiffusionPipeline
from .student_config import STUDENT_CONFIG, StudentConfig

__all__ = ["STUDENT_CONFIG", "RdmDistillationPipeline", "RdmStableDiffusionPipeline", "StudentConfig"]
