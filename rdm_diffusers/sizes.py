"""Sizes of pictures, as flags and records name them: `1024` is a square, `1216x832` is width x height."""

from __future__ import annotations

import re
from collections.abc import Sequence
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


def read_buckets(text: str) -> list[Resolution]:
    """The sizes of `--aspect_ratio_buckets`: `HEIGHT,WIDTH` pairs between semicolons, or `WIDTHxHEIGHT` ones.

    Raises:
        ValueError: as the end of a sentence, if one is no size, or is there twice.
    """
    found: list[Resolution] = []
    for each in text.split(";"):
        sides = [side.strip() for side in each.split(",")]
        size = RESOLUTION.parse("x".join(reversed(sides)) if len(sides) == 2 else each)
        if len(sides) > 2 or RESOLUTION.problem(size):
            raise ValueError(f"holds {each.strip() or 'an empty pair'}, which is no size")
        if size in found:
            raise ValueError(f"holds {size} twice, and each size may be there once")
        found.append(size)
    return found


def buckets_of(sizes: Sequence[Resolution]) -> str:
    """The sizes as the example scripts of diffusers take them: `HEIGHT,WIDTH;HEIGHT,WIDTH`."""
    return ";".join("{},{}".format(*height_and_width(size)) for size in sizes)


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


class BucketsBound(Bound):
    """Sizes of pictures, as `read_buckets` reads them."""

    def problem(self, value: Any) -> str | None:
        try:
            read_buckets(value)
        except ValueError as error:
            return f'{error}; give height,width pairs, "1024,1024;832,1216", or width x height, "1024x1024;1216x832"'
        return None

    def parse(self, text: str) -> Any:
        try:
            return buckets_of(read_buckets(text))
        except ValueError:
            return text  # which `problem` refuses


RESOLUTION, BUCKETS = SizeBound(), BucketsBound()
