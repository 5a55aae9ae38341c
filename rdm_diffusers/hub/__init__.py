"""Students as files that others load."""

from .card import write_card
from .comfyui import check_comfyui, comfyui_name, has_comfyui, read_lora, write_comfyui
from .export import WritingError, copy_lora, export_full, export_lora, write_full, writing

__all__ = [
    "WritingError",
    "check_comfyui",
    "comfyui_name",
    "copy_lora",
    "export_full",
    "export_lora",
    "has_comfyui",
    "read_lora",
    "write_card",
    "write_comfyui",
    "write_full",
    "writing",
]
