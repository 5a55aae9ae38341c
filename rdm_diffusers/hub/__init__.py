"""Students as files that others load."""

from .card import write_card
from .comfyui import check_comfyui, comfyui_name, has_comfyui, write_comfyui
from .export import WritingError, export_full, export_lora, finish_exports
from .push import PushError, check_push, push_student
from .space import check_space, push_space
from .student_files import check_complete, check_student, student_files

__all__ = [
    "PushError",
    "WritingError",
    "check_comfyui",
    "check_complete",
    "check_push",
    "check_space",
    "check_student",
    "comfyui_name",
    "export_full",
    "export_lora",
    "finish_exports",
    "has_comfyui",
    "push_space",
    "push_student",
    "student_files",
    "write_card",
    "write_comfyui",
]
