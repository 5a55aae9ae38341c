"""What differs between teachers, one file each."""

from .base import Conditioning, Family, PromptOptions, rebuilt
from .loading import (
    FAMILIES,
    LORA_FILE,
    Teacher,
    absent_components,
    family_of,
    load_options,
    load_teacher,
    pipeline_config,
)

__all__ = [
    "FAMILIES",
    "LORA_FILE",
    "Conditioning",
    "Family",
    "PromptOptions",
    "Teacher",
    "absent_components",
    "family_of",
    "load_options",
    "load_teacher",
    "pipeline_config",
    "rebuilt",
]
