"""Sampling students."""

from .pipeline_rdm import CLASSES, RdmDistillationPipeline
from .saving import stock_grid, stock_scheduler
from .student_config import STUDENT_CONFIG, StudentConfig, is_student
from .students import (
    RdmChromaPipeline,
    RdmFlux2KleinPipeline,
    RdmFlux2Pipeline,
    RdmFluxPipeline,
    RdmKrea2Pipeline,
    RdmLumina2Pipeline,
    RdmPixArtSigmaPipeline,
    RdmQwenImage21Pipeline,
    RdmQwenImagePipeline,
    RdmSanaPipeline,
    RdmStableDiffusion3Pipeline,
    RdmStableDiffusionPipeline,
    RdmStableDiffusionXLPipeline,
    RdmZImagePipeline,
)

__all__ = [
    "CLASSES",
    "STUDENT_CONFIG",
    "RdmChromaPipeline",
    "RdmDistillationPipeline",
    "RdmFlux2KleinPipeline",
    "RdmFlux2Pipeline",
    "RdmFluxPipeline",
    "RdmKrea2Pipeline",
    "RdmLumina2Pipeline",
    "RdmPixArtSigmaPipeline",
    "RdmQwenImage21Pipeline",
    "RdmQwenImagePipeline",
    "RdmSanaPipeline",
    "RdmStableDiffusion3Pipeline",
    "RdmStableDiffusionPipeline",
    "RdmStableDiffusionXLPipeline",
    "RdmZImagePipeline",
    "StudentConfig",
    "is_student",
    "stock_grid",
    "stock_scheduler",
]
