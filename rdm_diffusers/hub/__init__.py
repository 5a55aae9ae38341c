"""Students as files that others load."""

from .card import write_card
from .comfyui import check_comfyui, comfyui_name, has_comfyui, read_lora, write_comfyui
from .export import WritingError, copy_lora, export_full, export_lora, finish_exports, write_full, writing
from .push import PushError, check_push, existing_tags, push_student, retry_command, unfinished
from .student_files import (
    check_available_to_others,
    check_complete,
    check_student,
    copy_files,
    is_hub_id,
    student_files,
)

__all__ = [
    "PushError",
    "WritingError",
    "check_available_to_others",
    "check_comfyui",
    "check_complete",
    "check_push",
    "check_student",
    "comfyui_name",
    "copy_files",
    "copy_lora",
    "existing_tags",
    "export_full",
    "export_lora",
    "finish_exports",
    "has_comfyui",
    "is_hub_id",
    "push_student",
    "read_lora",
    "retry_command",
    "student_files",
    "unfinished",
    "write_card",
    "write_comfyui",
    "write_full",
    "writing",
]
