"""What differs between teachers, one file each."""

from .base import CARD, INDEX, LORA_FILE, STUDENT_CONFIG, Conditioning, Family, PromptOptions, on_white, rebuilt
from .hub_files import explain_hub_errors, fetch, use_token
from .loading import (
    Teacher,
    absent_components,
    check_kinds_of_files,
    check_pipeline,
    full_name,
    load_denoiser,
    load_options,
    load_scheduler,
    load_teacher,
    load_tiny_vae,
    load_vae,
    options_for,
    pipeline_config,
    schedule_of,
)
from .loras import Lora, LoraLayers, add_layers, fuse_loras, rank_of, read_lora
from .quantization import QUANTIZATIONS
from .registry import FAMILIES, family_of
from .suitability import check_index, check_lora, check_no_checkpoint

__all__ = [
    "CARD", "FAMILIES", "INDEX", "LORA_FILE", "QUANTIZATIONS", "STUDENT_CONFIG", "Conditioning", "Family", "Lora",
    "LoraLayers", "PromptOptions", "Teacher", "absent_components", "add_layers", "check_index", "check_kinds_of_files",
    "check_lora", "check_no_checkpoint", "check_pipeline", "explain_hub_errors", "family_of", "fetch", "full_name",
    "fuse_loras", "load_denoiser", "load_options", "load_scheduler", "load_teacher", "load_tiny_vae", "load_vae",
    "on_white", "options_for", "pipeline_config", "rank_of", "read_lora", "rebuilt", "schedule_of", "use_token",
]  # fmt: skip
