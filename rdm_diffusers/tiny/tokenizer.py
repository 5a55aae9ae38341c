"""A real `CLIPTokenizer` that needs no download: a byte alphabet, and merges that make each caption word one token."""

from __future__ import annotations

from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from .captions import CAPTIONS

MAX_TOKENS = 12
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")


def make_tokenizer() -> CLIPTokenizer:
    """Makes the same tokenizer every time. Any text other than the captions' words has a token for each letter."""
    alphabet = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in sorted({word for caption in CAPTIONS for word in caption.split()}):
        first, *rest = _apply(merges, [*word[:-1], f"{word[-1]}</w>"])
        for piece in rest:
            merges.append((first, piece))
            first += piece
    symbols = [*SPECIAL_TOKENS, *alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    vocabulary = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _apply(merges: list[tuple[str, str]], pieces: list[str]) -> list[str]:
    """Byte-pair encoding: applies the earliest fitting merge until none fits."""
    while fitting := [pair for pair in merges if pair in pairwise(pieces)]:
        at = list(pairwise(pieces)).index(fitting[0])
        pieces[at : at + 2] = ["".join(fitting[0])]
    return pieces
