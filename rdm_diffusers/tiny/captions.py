"""What the tiny teachers can draw, a digit, an ink and a background, named in a caption; and the captions' tokenizer.

The tokenizer is a real `CLIPTokenizer` that needs no download: a byte alphabet, and merges that make each caption word
one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

MAX_TOKENS = 12
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

INKS: dict[str, tuple[float, float, float]] = {
    "black": (0.05, 0.05, 0.07),
    "white": (0.97, 0.97, 0.97),
    "red": (0.80, 0.10, 0.12),
    "green": (0.08, 0.50, 0.20),
    "yellow": (0.98, 0.85, 0.15),
    "purple": (0.40, 0.05, 0.50),
}

BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "blue": (0.20, 0.40, 0.85),
    "grey": (0.60, 0.60, 0.62),
    "pink": (0.98, 0.70, 0.75),
    "cyan": (0.45, 0.85, 0.88),
}


@dataclass(frozen=True)
class Drawing:
    """One of the 240 drawings; every field is an index: digit 0-9, ink 0-5, background 0-3."""

    digit: int
    ink: int
    background: int

    @property
    def caption(self) -> str:
        """For example ``"a red seven on a blue background"``."""
        ink, background = list(INKS)[self.ink], list(BACKGROUNDS)[self.background]
        return f"a {ink} {DIGITS[self.digit]} on a {background} background"

    @property
    def held_out(self) -> bool:
        """Whether it is one of the 24 drawings that no teacher was trained on, one digit for each pair of colours."""
        return (self.digit - 4 * self.ink - self.background) % 10 == 0


DRAWINGS = tuple(Drawing(*index) for index in product(range(len(DIGITS)), range(len(INKS)), range(len(BACKGROUNDS))))
CAPTIONS = tuple(drawing.caption for drawing in DRAWINGS)


def parse_caption(caption: str) -> Drawing:
    """The drawing that a caption names.

    Raises:
        ValueError: if the caption is not one of `CAPTIONS`.
    """
    try:
        return DRAWINGS[CAPTIONS.index(caption)]
    except ValueError:
        raise ValueError(
            f"The tiny teacher does not know the caption {caption!r}; write it like {CAPTIONS[0]!r}."
        ) from None


def make_tokenizer(captions: Sequence[str] = CAPTIONS, max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """Makes the same tokenizer every time. Any text other than the captions' words has a token for each letter."""
    alphabet = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in sorted({word for caption in captions for word in caption.split()}):
        first, *rest = _apply(merges, [*word[:-1], f"{word[-1]}</w>"])
        for piece in rest:
            merges.append((first, piece))
            first += piece
    symbols = [*SPECIAL_TOKENS, *alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    vocabulary = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens)


def _apply(merges: list[tuple[str, str]], pieces: list[str]) -> list[str]:
    """Byte-pair encoding: applies the earliest fitting merge until none fits."""
    while fitting := [pair for pair in merges if pair in pairwise(pieces)]:
        at = list(pairwise(pieces)).index(fitting[0])
        pieces[at : at + 2] = ["".join(fitting[0])]
    return pieces
