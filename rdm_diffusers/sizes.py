"""Sizes of pictures, as flags and records name them: `1024` is a square, `1216x832` is width x height."""

from __future__ import annotations

import re
from typing import Any

from .bounds import Bound

Resolution = int | str  # pixels per side of a square, or "WIDTHxHEIGHT"
MOST = 16384  # pixels per side
SIZE = re.compile(r"(\d{1,9})(?:[xX](\d{1,9}))?")


def height_and_width(resolution: Resolution) -> tuple[int, int]:
    """The two sides in pixels, in the order of tensors. Raises ValueError if the text is no size."""
    found = SIZE.fullmatch(str(resolution).strip())
    if found is None:
        raise ValueError(f"{resolution!r} is no size; give pixels per side, 1024, or width x height, 1216x832.")
    width, height = int(found[1]), int(found[2] or found[1])
    return height, width


def resolution_of(height: int, width: int) -> Resolution:
    """The name of a size; one size has one name."""
    return width if height == width else f"{width}x{height}"


def nearest(resolution: Resolution, multiple: int, most: int | None = None) -> Resolution:
    """The nearest size whose sides are multiples of a number of pixels, and at most `most`."""
    sides = (min(side, most or side) for side in height_and_width(resolution))
    height, width = (max(1, min(round(side / multiple), (most or MOST) // multiple)) * multiple for side in sides)
    return resolution_of(height, width)


def in_words(resolution: Resolution) -> str:
    """`1216 x 832`, width first."""
    height, width = height_and_width(resolution)
    return f"{width} x {height}"


class SizeBound(Bound):
    """A size of pictures."""

    kinds = (int, str)

    def problem(self, value: Any) -> str | None:
        try:
            sides = height_and_width(value)
        except ValueError:
            text = value if str(value).strip() else "empty"
            return f"is {text}; it must be pixels per side, 1024 for example, or width x height, 1216x832"
        if all(1 <= side <= MOST for side in sides):
            return None
        return f"is {value}; each side must be at least 1 and at most {MOST}"

    def parse(self, text: str) -> Any:
        try:
            return resolution_of(*height_and_width(text))
        except ValueError:
            return text  # which `problem` refuses


RESOLUTION = SizeBound()
