"""The few-step pipeline of each family: its stock one with the student's settings, see `RdmDistillationPipeline`."""

from __future__ import annotations

from diffusers import (
    ChromaPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    Krea2Pipeline,
    Lumina2Pipeline,
    PixArtSigmaPipeline,
    QwenImage21Pipeline,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)

from .pipeline_rdm import RdmDistillationPipeline


class RdmStableDiffusionPipeline(RdmDistillationPipeline, StableDiffusionPipeline):
    """A few-step student of a Stable Diffusion 1 or 2 teacher."""


class RdmStableDiffusionXLPipeline(RdmDistillationPipeline, StableDiffusionXLPipeline):
    """A few-step student of a Stable Diffusion XL teacher."""


class RdmStableDiffusion3Pipeline(RdmDistillationPipeline, StableDiffusion3Pipeline):
    """A few-step student of a Stable Diffusion 3 teacher."""


class RdmFluxPipeline(RdmDistillationPipeline, FluxPipeline):
    """A few-step student of a FLUX.1 teacher."""


class RdmPixArtSigmaPipeline(RdmDistillationPipeline, PixArtSigmaPipeline):
    """A few-step student of a PixArt-Sigma teacher."""


class RdmSanaPipeline(RdmDistillationPipeline, SanaPipeline):
    """A few-step student of a SANA teacher."""


class RdmZImagePipeline(RdmDistillationPipeline, ZImagePipeline):
    """A few-step student of a Z-Image teacher."""


class RdmQwenImagePipeline(RdmDistillationPipeline, QwenImagePipeline):
    """A few-step student of a Qwen-Image teacher."""


class RdmFlux2KleinPipeline(RdmDistillationPipeline, Flux2KleinPipeline):
    """A few-step student of a FLUX.2 klein teacher."""


class RdmChromaPipeline(RdmDistillationPipeline, ChromaPipeline):
    """A few-step student of a Chroma teacher."""


class RdmFlux2Pipeline(RdmDistillationPipeline, Flux2Pipeline):
    """A few-step student of a FLUX.2 dev teacher."""


class RdmQwenImage21Pipeline(RdmDistillationPipeline, QwenImage21Pipeline):
    """A few-step student of a Qwen-Image 2.1 teacher."""


class RdmLumina2Pipeline(RdmDistillationPipeline, Lumina2Pipeline):
    """A few-step student of a Lumina 2 teacher."""


class RdmKrea2Pipeline(RdmDistillationPipeline, Krea2Pipeline):
    """A few-step student of a Krea 2 teacher."""
