"""A real `CLIPTokenizer` made offline: the byte alphabet, and merges that make every caption word one token."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from .captions import CAPTIONS

MAX_TOKENS = 12
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")


def make_tokenizer() -> CLIPTokenizer:
    """Trains byte-pair merges on the captions; any other text still has tokens, letter by letter."""
    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet), *SPECIAL_TOKENS]
    untrained = CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[])
    trained = untrained.train_new_from_iterator(CAPTIONS, vocab_size=len(symbols) + 200)
    trained.model_max_length = MAX_TOKENS
    return trained
