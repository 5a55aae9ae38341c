"""Students as files that others load."""

from .card import write_card
from .export import export_full, export_lora
from .push import PushError, check_push, push_student
from .student_files import check_base, student_files

__all__ = [
    "PushError",
    "check_base",
    "check_push",
    "export_full",
    "export_lora",
    "push_student",
    "student_files",
    "write_card",
]
