"""Every family by the name of its stock pipeline class; a new family needs one file and one row here."""

from __future__ import annotations

from typing import Any

from .base import Family
from .chroma_1 import ChromaFamily
from .flux import FluxFamily
from .flux_2 import Flux2Family, Flux2KleinFamily
from .krea_2 import Krea2Family
from .lumina_2 import Lumina2Family
from .pixart_sigma import PixArtSigmaFamily
from .qwen_image import QwenImageFamily
from .qwen_image_21 import QwenImage21Family
from .sana import SanaFamily
from .sd3 import StableDiffusion3Family
from .sd_unet import StableDiffusionFamily
from .sdxl import StableDiffusionXLFamily
from .z_image import ZImageFamily

CLASSES: tuple[type[Family], ...] = (
    StableDiffusionFamily, StableDiffusionXLFamily, StableDiffusion3Family, FluxFamily, PixArtSigmaFamily, SanaFamily,
    ZImageFamily, QwenImageFamily, Flux2KleinFamily, ChromaFamily, Flux2Family, QwenImage21Family, Lumina2Family,
    Krea2Family,
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.pipeline_class.__name__: family() for family in CLASSES}


def family_of(config: dict[str, Any]) -> Family:
    """The family of the pipeline class that a `pipeline_config` names. Raises ValueError if there is none."""
    class_name = config["_class_name"]
    if class_name not in FAMILIES:
        raise ValueError(f"Teachers of class {class_name} are not supported; supported are {', '.join(FAMILIES)}.")
    return FAMILIES[class_name]
