"""Text encoders that learn to read the captions of scenes before the transformer is trained on them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .captions import BACKGROUNDS, DIGITS, INKS
from .make_flow_teacher import encode_text
from .make_teacher import text_config
from .scene_classifier import labels_of, reading_loss
from .scenes import PLACES, SIZES, Scene

TEXT_DIMS = (96, 32)
TEXT_LAYERS = 3
MAX_DIGITS = 4


class CaptionReader(nn.Module):
    """Two text encoders, and heads that repeat what a caption says.

    The token of a digit names that digit's ink, its size and its rank; the pooled embedding names the whole scene.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        dim, places = sum(TEXT_DIMS), len(PLACES)
        self.encoders = nn.ModuleList(
            CLIPTextModelWithProjection(text_config(tokenizer, each, TEXT_LAYERS)) for each in TEXT_DIMS
        )
        counts = {"digit": len(DIGITS), "ink": len(INKS), "size": len(SIZES), "rank": MAX_DIGITS}
        self.token_heads = nn.ModuleDict({name: nn.Linear(dim, count) for name, count in counts.items()})
        classes = {"digit": len(DIGITS) + 1, "ink": len(INKS), "size": len(SIZES)}
        self.place_heads = nn.ModuleDict({name: nn.Linear(dim, places * count) for name, count in classes.items()})
        self.background_head = nn.Linear(dim, len(BACKGROUNDS))
        self.digit_tokens = torch.tensor([tokenizer.convert_tokens_to_ids(f"{digit}</w>") for digit in DIGITS])

    def forward(self, tokens: Tensor, scenes: list[Scene]) -> Tensor:
        """The cross-entropy, a scalar, between B captions (token ids `[B, 27]`) and what they say."""
        embeds, pooled = encode_text(self.encoders, tokens)
        scene = {name: head(pooled).unflatten(1, (len(PLACES), -1)) for name, head in self.place_heads.items()}
        whole = reading_loss({**scene, "background": self.background_head(pooled)}, labels_of(scenes))
        at_digits = embeds[:, : tokens.shape[1]][torch.isin(tokens, self.digit_tokens)]
        said = torch.tensor([(n.digit, n.ink, n.size, rank) for each in scenes for rank, n in enumerate(each.numerals)])
        heads = self.token_heads.values()
        return whole + sum(F.cross_entropy(head(at_digits), said[:, i]) for i, head in enumerate(heads))
