"""Sampling students."""

from .pipeline_rdm import RdmDistillationPipeline
from .student_config import STUDENT_CONFIG, StudentConfig
from .students import (
    RdmFluxPipeline,
    RdmPixArtSigmaPipeline,
    RdmQwenImagePipeline,
    RdmSanaPipeline,
    RdmStableDiffusion3Pipeline,
    RdmStableDiffusionPipeline,
    RdmStableDiffusionXLPipeline,
    RdmZImagePipeline,
)

__all__ = [
    "STUDENT_CONFIG",
    "RdmDistillationPipeline",
    "RdmFluxPipeline",
    "RdmPixArtSigmaPipeline",
    "RdmQwenImagePipeline",
    "RdmSanaPipeline",
    "RdmStableDiffusion3Pipeline",
    "RdmStableDiffusionPipeline",
    "RdmStableDiffusionXLPipeline",
    "RdmZImagePipeline",
    "StudentConfig",
]
