"""PickScore (Kirstain et al., arXiv 2305.01569): which of two pictures people picked for a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from .clip import VIT_H_TOKENIZER, ClipReward, clip_tokenizer, load_clip
from .preprocessing import Preprocessing

SOURCE = "yuvalkirstain/PickScore_v1"


class PickScore(ClipReward):
    """The cosine of the two embeddings times the model's own scale, as on its model card.

    A difference of d between two pictures of a prompt says that the first is preferred with probability sigmoid(d).
    Preprocessing as the processor of CLIP ViT-H-14 that its card names (transformers' `CLIPImageProcessor`): shorter
    side to 224, bicubic, middle, CLIP's mean and standard deviation.
    """

    def scaled(self, cosine: Tensor) -> Tensor:
        """Cosines `[B]` -> about 17 to 24 for generated pictures; the published scale is about 100."""
        return self.model.logit_scale.exp().to(cosine.dtype) * cosine


def load(path: str | None, dtype: torch.dtype) -> PickScore:
    """PickScore v1 from the Hub, or from a folder or Hub repository that transformers can load.

    Raises:
        ValueError: one sentence on what is missing or wrong.
    """
    model, found = load_clip("pickscore", path or SOURCE, dtype)
    tokenizer = clip_tokenizer("pickscore", model, found, VIT_H_TOKENIZER)
    return PickScore("pickscore", model, tokenizer, Preprocessing(model.config.vision_config.image_size))
