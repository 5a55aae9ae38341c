"""The roles of a distillation, *student*, *fake score*, *teacher* and *target*, behind one call that returns x0."""

from .base import ADAPTERS, FAKE_SCORE, ROLES, STUDENT, TARGET, TEACHER, Networks
from .separate import SeparateNetworks
from .shared import SharedBase

__all__ = [
    "ADAPTERS", "FAKE_SCORE", "ROLES", "STUDENT", "TARGET", "TEACHER", "Networks", "SeparateNetworks", "SharedBase",
]  # fmt: skip
