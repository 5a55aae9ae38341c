"""LAION's aesthetic predictor, version 2 (`sac+logos+ava1-l14-linearMSE`): how beautiful people find a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPModel

from .clip import embed_images, load_clip
from .clip_score import SOURCE as CLIP_SOURCE
from .preprocessing import Preprocessing
from .pretrained import PretrainedReward
from .scoring_head import ScoringHead
from .weights import load_head, published_file, read_tensors

# TRL's copy of the file that github.com/christophschuhmann/improved-aesthetic-predictor publishes
SOURCE, SOURCE_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
FILES = ("aesthetic.safetensors", SOURCE_FILE, "sac+logos+ava1-l14-linearMSE.pth")


class Aesthetic(PretrainedReward):
    """A linear judgement of the picture's CLIP embedding, on a scale of 1 to 10; the prompt does not matter.

    Preprocessing as OpenAI's `clip` package: shorter side to 224, bicubic, middle (rounded as torchvision does), CLIP's
    mean and standard deviation.

    Args:
        model: CLIP ViT-L/14; its text tower is not used.
        head: judges the embedding.
    """

    def __init__(self, model: CLIPModel, head: ScoringHead) -> None:
        super().__init__("aesthetic")
        self.model, self.head = model, head
        self.preprocessing = Preprocessing(model.config.vision_config.image_size, rounds_up=True)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] -> `[B]`. Gradients flow to the images."""
        embeddings = embed_images(self.model, self.preprocessing(images).to(self.dtype))
        return self.head(embeddings)


def load(path: str | None, dtype: torch.dtype) -> Aesthetic:
    """The published head on OpenAI's ViT-L/14.

    Args:
        path: None for both from the Hub; a file of the head, or a folder that holds one of `FILES`. A folder `clip`
            beside the file is the CLIP model, which otherwise comes from the Hub.
        dtype: of CLIP's weights; the head is float32.

    Raises:
        ValueError: one sentence on what is missing or wrong.
    """
    file = published_file("aesthetic", path, SOURCE, SOURCE_FILE, FILES)
    tensors = read_tensors("aesthetic", file)  # first, because it is small
    beside = file.parent / "clip"
    model, _ = load_clip("aesthetic", beside if beside.is_dir() else CLIP_SOURCE, dtype)
    head = ScoringHead(model.config.projection_dim)
    load_head("aesthetic", file, head, tensors)
    return Aesthetic(model, head)
