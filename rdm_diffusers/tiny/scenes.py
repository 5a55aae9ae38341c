"""What the teacher `tiny-scenes` can draw: two to four digits with sizes, inks and places, on a background.

A caption is read like a page. "above" parts two rows, "left of" the digits of a row:
"a large red seven left of a small green two above a small black one on a blue background".
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .captions import BACKGROUNDS, DIGITS, INKS

IMAGE_SIZE = 64
MAX_TOKENS = 27  # of the longest caption, with both ends
SIZES = ("small", "large")
PLACES: dict[str, tuple[int, int]] = {  # the centre of each place: x, y in pixels
    "top left": (16, 16), "top": (32, 16), "top right": (48, 16),
    "left": (16, 32), "right": (48, 32),
    "bottom left": (16, 48), "bottom": (32, 48), "bottom right": (48, 48),
}  # fmt: skip
LAYOUTS: dict[tuple[int, ...], tuple[str, ...]] = {  # digits in each row: their places in reading order
    (2,): ("left", "right"),
    (1, 1): ("top", "bottom"),
    (2, 1): ("top left", "top right", "bottom"),
    (1, 2): ("top", "bottom left", "bottom right"),
    (2, 2): ("top left", "top right", "bottom left", "bottom right"),
}


@dataclass(frozen=True)
class Numeral:
    """One digit of a scene; every field is an index: digit 0-9, ink 0-5, size 0-1."""

    digit: int
    ink: int
    size: int

    @property
    def words(self) -> str:
        """For example ``"a large red seven"``."""
        return f"a {SIZES[self.size]} {list(INKS)[self.ink]} {DIGITS[self.digit]}"

    @property
    def held_out(self) -> bool:
        """Whether the teacher never saw this digit in this ink: one digit of each ink, such as a red seven."""
        return self.digit == (3 * self.ink + 1) % len(DIGITS)


@dataclass(frozen=True)
class Scene:
    """Two to four digits in reading order, one of the keys of `LAYOUTS`, and the index of a background, 0-3."""

    rows: tuple[int, ...]
    numerals: tuple[Numeral, ...]
    background: int

    @property
    def caption(self) -> str:
        """The text that `parse_scene` reads back."""
        words = iter(numeral.words for numeral in self.numerals)
        rows = [" left of ".join(next(words) for _ in range(count)) for count in self.rows]
        return f"{' above '.join(rows)} on a {list(BACKGROUNDS)[self.background]} background"

    @property
    def places(self) -> tuple[str, ...]:
        """The place of each digit."""
        return LAYOUTS[self.rows]

    @property
    def held_out(self) -> bool:
        """Whether the teacher never saw one of its digits in its ink."""
        return any(numeral.held_out for numeral in self.numerals)


def random_scene(below: Callable[[int], int]) -> Scene:
    """A scene whose every part is uniform; `below(n)` draws an integer from 0 to n - 1."""
    rows = list(LAYOUTS)[below(len(LAYOUTS))]
    numerals = tuple(Numeral(below(len(DIGITS)), below(len(INKS)), below(len(SIZES))) for _ in range(sum(rows)))
    return Scene(rows, numerals, below(len(BACKGROUNDS)))


def _listed_scenes(count: int) -> tuple[Scene, ...]:
    generator = random.Random(0)
    scenes: dict[Scene, None] = {}  # a set that keeps its order
    while len(scenes) < count:
        scenes[random_scene(lambda n: int(n * generator.random()))] = None
    return tuple(scenes)


SCENES = _listed_scenes(2000)  # of more than a billion, those whose captions are the teacher's own prompts
SCENE_CAPTIONS = tuple(scene.caption for scene in SCENES)


def parse_scene(caption: str) -> Scene:
    """The scene that a caption names.

    Raises:
        ValueError: if the caption is not of the grammar.
    """
    try:
        digits, background = caption.removesuffix(" background").split(" on a ")
        rows = [row.split(" left of ") for row in digits.split(" above ")]
        numerals = tuple(_parse_numeral(words) for row in rows for words in row)
        scene = Scene(tuple(map(len, rows)), numerals, list(BACKGROUNDS).index(background))
        if scene.rows in LAYOUTS and scene.caption == caption:
            return scene
    except ValueError:
        pass
    raise ValueError(
        f"The teacher of scenes does not know the caption {caption!r}; write it like {SCENE_CAPTIONS[0]!r}."
    )


def _parse_numeral(words: str) -> Numeral:
    _, size, ink, digit = words.split()
    return Numeral(DIGITS.index(digit), list(INKS).index(ink), SIZES.index(size))
