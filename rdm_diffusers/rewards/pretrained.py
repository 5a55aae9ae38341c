"""What rewards with a pretrained network share: batches, devices, and a head from embedding to score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .preprocessing import as_float

WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # of the linear layers in the published files: three dropouts stand between the first four


class PretrainedReward(nn.Module):
    """A network that judges pictures; frozen. A subclass says how in `score`.

    Attributes:
        name: what logs and errors call it.
        differentiable: True, gradients flow to the images.
        batch_size: how many pictures the network sees at once. This bounds memory where no gradients are wanted; with
            gradients every batch keeps its graph, so ask for few pictures at a time, as the training does.
    """

    differentiable = True

    def __init__(self, name: str, batch_size: int = 16) -> None:
        super().__init__()
        self.name, self.batch_size = name, batch_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights; its input takes it on, its answer is float32 at least."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the network; pictures come here from wherever they are, and gradients go back."""
        return next(self.parameters()).device

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] and B prompts -> `[B]`, float32 at least, on the network's device.

        Gradients flow to the images.
        """
        starts = range(0, len(images), self.batch_size)
        batches = [slice(start, start + self.batch_size) for start in starts]
        return torch.cat([self.score(images[batch].to(self.device), prompts[batch]) for batch in batches])

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As `forward`, of one batch on the network's device."""
        raise NotImplementedError


class ScoringHead(nn.Module):
    """Five linear layers with nothing between them, float32: the head of LAION's aesthetic predictor and ImageReward.

    Its tensors are named as in the published files, `layers.0.weight` and so on; the dropouts, which do nothing
    outside training, are left out.

    Args:
        width: of the embedding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        shapes = zip((width, *WIDTHS), WIDTHS, strict=False)
        self.layers = nn.ModuleDict({str(at): nn.Linear(*shape) for at, shape in zip(PLACES, shapes, strict=True)})

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings `[B, width]` -> scores `[B]`, float32 at least. Gradients flow to the embeddings."""
        scores = embeddings.to(next(self.parameters()).dtype)
        for layer in self.layers.values():
            scores = layer(scores)
        return as_float(scores)[:, 0]
