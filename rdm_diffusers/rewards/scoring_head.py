"""The small head that turns an embedding into a score, of one shape in LAION's aesthetic predictor and ImageReward."""

from __future__ import annotations

from torch import Tensor, nn

from .preprocessing import as_float

WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # of the linear layers in the published files: three dropouts stand between the first four


class ScoringHead(nn.Module):
    """Five linear layers with nothing between them, in float32 whatever the network before it has.

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
