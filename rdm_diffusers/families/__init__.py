"""What differs between teachers, one file each."""

from .base import CARD, INDEX, LORA_FILE, STUDENT_CONFIG, Family, on_white, rebuilt
from .conditioning import Conditioning, PromptOptions
from .few_steps import check_lora_not_distilled, few_step_warning
from .hub_files import explain_hub_errors, fetch, use_token
from .loading import (
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
    pipeline_config,
    teacher_config,
)
from .loras import Lora, LoraLayers, add_layers, fuse_loras, rank_of, read_lora
from .quantization import QUANTIZATIONS
from .registry import FAMILIES, family_of
from .single_file import SingleFile, is_single_file, origin_of
from .single_file_parts import check_prediction, load_parts, parts_of, rest_of
from .suitability import check_lora, check_no_checkpoint, check_teacher
from .teacher import Teacher, options_for, schedule_of

__all__ = [
    "CARD", "FAMILIES", "INDEX", "LORA_FILE", "QUANTIZATIONS", "STUDENT_CONFIG", "Conditioning", "Family", "Lora",
    "LoraLayers", "PromptOptions", "SingleFile", "Teacher", "absent_components", "add_layers", "check_kinds_of_files",
    "check_lora", "check_lora_not_distilled", "check_no_checkpoint", "check_pipeline", "check_prediction",
    "check_teacher", "explain_hub_errors", "family_of", "fetch", "few_step_warning", "full_name", "fuse_loras",
    "is_single_file", "load_denoiser", "load_options", "load_parts", "load_scheduler", "load_teacher", "load_tiny_vae",
    "load_vae", "on_white", "options_for", "origin_of", "parts_of", "pipeline_config", "rank_of", "read_lora",
    "rebuilt", "rest_of", "schedule_of", "teacher_config", "use_token",
]  # fmt: skip
