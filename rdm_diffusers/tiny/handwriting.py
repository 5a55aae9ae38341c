"""Real handwriting in colour: scikit-learn's 1,797 digit scans, drawn with an ink on a background."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import BACKGROUNDS, DRAWINGS, INKS, Drawing

IMAGE_SIZE = 32


class Handwriting:
    """The scans, and how they are drawn.

    Args:
        generator: of scans, shifts and colours; there is no other randomness.

    Raises:
        ImportError: if scikit-learn, which includes the scans, is not installed.
    """

    def __init__(self, generator: torch.Generator):
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("The digit scans come with scikit-learn: pip install 'rdm-diffusers[tiny]'.") from error
        digits = load_digits()
        self.scans = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        self.labels = torch.tensor(digits.target)
        self.generator = generator

    def draw(self, drawings: list[Drawing], scans: Tensor | None = None) -> Tensor:
        """One image for each of B drawings.

        Args:
            drawings: what to draw.
            scans: indices `[B]` into `self.scans`; by default random scans of the right digits.

        Returns:
            Images `[B, 3, 32, 32]` in [0, 1].
        """
        if scans is None:
            scans = torch.stack([self._scan_of(drawing.digit) for drawing in drawings])
        strokes = self._strokes(self.scans[scans])
        inks = self._colours(list(INKS.values()), [drawing.ink for drawing in drawings])
        backgrounds = self._colours(list(BACKGROUNDS.values()), [drawing.background for drawing in drawings])
        return (backgrounds + strokes * (inks - backgrounds)).clamp(0, 1)

    def random_drawings(self, count: int, held_out: bool = False) -> list[Drawing]:
        """`count` drawings, uniform over the 216 of the training, or with `held_out` over all 240."""
        pool = [drawing for drawing in DRAWINGS if held_out or not drawing.held_out]
        return [pool[i] for i in torch.randint(len(pool), (count,), generator=self.generator)]

    def _scan_of(self, digit: int) -> Tensor:
        candidates = (self.labels == digit).nonzero()[:, 0]
        return candidates[torch.randint(len(candidates), (), generator=self.generator)]

    def _strokes(self, scans: Tensor) -> Tensor:
        """Scans `[B, 1, 8, 8]` -> coverage `[B, 1, 32, 32]` in [0, 1], each shifted by up to 2 pixels."""
        batch = len(scans)
        zoom = 1.15 + 0.15 * torch.rand(batch, 1, generator=self.generator)
        shift = (torch.rand(batch, 2, generator=self.generator) * 2 - 1) * 2 / (IMAGE_SIZE / 2)
        affine = torch.zeros(batch, 2, 3)
        affine[:, 0, 0] = affine[:, 1, 1] = zoom[:, 0]
        affine[:, :, 2] = shift
        grid = F.affine_grid(affine, [batch, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
        grey = F.grid_sample(scans, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
        return torch.sigmoid((grey - 0.42) * 12)

    def _colours(self, palette: list[tuple[float, float, float]], indices: list[int]) -> Tensor:
        colours = torch.tensor(palette)[indices]
        return (colours + 0.02 * torch.randn(colours.shape, generator=self.generator))[:, :, None, None]
