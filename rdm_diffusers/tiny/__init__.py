"""The embedded tiny teacher: a real Stable Diffusion pipeline that draws coloured handwritten digits."""

from pathlib import Path

TINY_TEACHER = str(Path(__file__).parent / "teacher")
TINY_NAME = "tiny"

__all__ = ["TINY_NAME", "TINY_TEACHER", "resolve_teacher"]


def resolve_teacher(name_or_path: str) -> str:
    """The folder of the embedded teacher for the name `tiny`; any other name unchanged."""
    return TINY_TEACHER if name_or_path == TINY_NAME else name_or_path
