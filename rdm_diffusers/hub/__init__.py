"""Students as files that others load."""

from .card import write_card
from .export import export_full, export_lora

__all__ = ["export_full", "export_lora", "write_card"]
