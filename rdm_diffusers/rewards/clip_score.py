"""CLIP score (Hessel et al., arXiv 2104.08718): how well a picture goes with its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from .clip import ClipReward, clip_tokenizer, load_clip
from .preprocessing import Preprocessing

SOURCE = "openai/clip-vit-large-patch14"


class ClipScore(ClipReward):
    """100 times the cosine of the two embeddings.

    torchmetrics cuts negative ones off at 0; this does not, because a picture at 0 would get no gradient to leave it.
    Preprocessing as transformers' `CLIPImageProcessor`: shorter side to the model's size, bicubic, middle, CLIP's mean
    and standard deviation.
    """

    def scaled(self, cosine: Tensor) -> Tensor:
        """Cosines `[B]` -> -100 to 100; real pictures lie at about 15 to 35."""
        return 100 * cosine


def load(path: str | None, dtype: torch.dtype) -> ClipScore:
    """The score by OpenAI's ViT-L/14, or by the CLIP in a folder or Hub repository that transformers can load.

    Raises:
        ValueError: one sentence on what is missing or wrong.
    """
    model, found = load_clip("clip_score", path or SOURCE, dtype)
    tokenizer = clip_tokenizer("clip_score", model, found, SOURCE if found or not path else path)
    return ClipScore("clip_score", model, tokenizer, Preprocessing(model.config.vision_config.image_size))
