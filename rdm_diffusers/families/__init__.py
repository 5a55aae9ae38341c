"""What differs between teachers, one file each."""

from .base import Conditioning, Family, rebuilt
from .loading import FAMILIES, LORA_FILE, Teacher, family_of, load_teacher

__all__ = ["FAMILIES", "LORA_FILE", "Conditioning", "Family", "Teacher", "family_of", "load_teacher", "rebuilt"]
