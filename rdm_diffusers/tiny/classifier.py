"""The tiny feature network: it recognises digit, ink and background, and gives features for Fréchet distances."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .captions import BACKGROUNDS, DIGITS, INKS, Drawing

FEATURE_DIM = 64


class DrawingClassifier(nn.Module):
    """A small convolutional network with 64 features and a head each for digit, ink and background."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * 16, FEATURE_DIM),
            nn.GELU(),
        )
        choices = {"digit": DIGITS, "ink": INKS, "background": BACKGROUNDS}
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURE_DIM, len(each)) for name, each in choices.items()})

    def features(self, images: Tensor) -> Tensor:
        """Images `[B, 3, 32, 32]` in [0, 1] -> features `[B, 64]`. Gradients flow to the images."""
        return self.body(images * 2 - 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits per head, `{"digit": [B, 10], "ink": [B, 6], "background": [B, 4]}`."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}

    def correct(self, images: Tensor, drawings: Sequence[Drawing]) -> dict[str, Tensor]:
        """Whether each image shows what it should, as `{"digit", "ink", "background", "all"}` of bool `[B]`."""
        logits = self(images)
        right = {
            name: logits[name].argmax(-1).cpu() == torch.tensor([getattr(drawing, name) for drawing in drawings])
            for name in self.heads
        }
        right["all"] = torch.stack(list(right.values())).all(0)
        return right

    def log_likelihood(self, images: Tensor, drawings: Sequence[Drawing]) -> Tensor:
        """The log-probability `[B]` of what each image should show, averaged over the heads."""
        terms = []
        for head, logits in self(images).items():
            index = torch.tensor([getattr(drawing, head) for drawing in drawings], device=images.device)
            terms.append(logits.log_softmax(-1).gather(-1, index[:, None])[:, 0])
        return torch.stack(terms).mean(0)


def load_classifier(folder: str | Path | None = None) -> DrawingClassifier:
    """The trained classifier in `folder` (by default the embedded one), frozen and in evaluation mode."""
    path = Path(folder or Path(__file__).parent) / "classifier.safetensors"
    classifier = DrawingClassifier()
    classifier.load_state_dict(load_file(path))
    return classifier.eval().requires_grad_(False)
