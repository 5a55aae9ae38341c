"""The feature network of scenes: it reads each place's digit, ink and size, and the background."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .captions import BACKGROUNDS, DIGITS, INKS
from .scenes import PLACES, SIZES, Scene

STRIDE = 8  # pixels of one cell of the feature map
WINDOW = 4  # cells of a place's window, which is 32 x 32 pixels about its centre
CHANNELS = 64
PLACE_DIM = 16
FEATURE_DIM = PLACE_DIM * len(PLACES)
EMPTY = len(DIGITS)  # the class of a place without a digit


def _convolution(channels: int, out_channels: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out_channels, 3, stride, 1), nn.GroupNorm(8, out_channels), nn.GELU()


class SceneClassifier(nn.Module):
    """A small convolutional network, whose heads read the same window about every place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(3, 32, 2), *_convolution(32, 64, 1), *_convolution(64, 64, 2), *_convolution(64, 96, 1),
            *_convolution(96, CHANNELS, 2),
        )  # fmt: skip
        self.window = nn.Sequential(
            nn.Linear(CHANNELS * WINDOW**2, 64), nn.GELU(), nn.Linear(64, PLACE_DIM), nn.GELU()
        )  # fmt: skip
        choices = {"digit": len(DIGITS) + 1, "ink": len(INKS), "size": len(SIZES), "background": len(BACKGROUNDS)}
        self.heads = nn.ModuleDict({name: nn.Linear(PLACE_DIM, count) for name, count in choices.items()})

    def features(self, images: Tensor) -> Tensor:
        """Images `[B, 3, 64, 64]` in [0, 1] -> features `[B, 128]`, 16 of each place. Gradients flow to the images."""
        cells = self.body(images * 2 - 1)
        corners = [(x // STRIDE - WINDOW // 2, y // STRIDE - WINDOW // 2) for x, y in PLACES.values()]
        windows = [cells[:, :, y : y + WINDOW, x : x + WINDOW].flatten(1) for x, y in corners]
        return self.window(torch.stack(windows, 1)).flatten(1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits per head: "digit" `[B, 8, 11]`, "ink" `[B, 8, 6]`, "size" `[B, 8, 2]`, "background" `[B, 4]`."""
        features = self.features(images).unflatten(1, (len(PLACES), PLACE_DIM))
        logits = {name: head(features) for name, head in self.heads.items()}
        return {**logits, "background": logits["background"].mean(1)}

    def correct(self, images: Tensor, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """Whether each image shows what it should, as `{"places", "digit", "ink", "size", "background", "all"}`.

        Each is bool `[B]`. "places" are right if there are digits there and nowhere else; "digit", "ink" and "size"
        are, if they are those of all digits of the scene.
        """
        found = {name: logits.argmax(-1).cpu() for name, logits in self(images).items()}
        asked = labels_of(scenes)
        filled = asked["digit"] != EMPTY
        right = {"places": ((found["digit"] != EMPTY) == filled).all(1)}
        for name in ("digit", "ink", "size"):
            right[name] = ((found[name] == asked[name]) | ~filled).all(1)
        right["background"] = found["background"] == asked["background"]
        right["all"] = torch.stack(list(right.values())).all(0)
        return right

    def log_likelihood(self, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """The log-probability `[B]` of what each image should show, averaged over all that its caption says."""
        logits, labels = self(images), labels_of(scenes)
        empty = labels["digit"].to(images.device) == EMPTY
        terms = {name: each.log_softmax(-1) for name, each in logits.items()}
        found = {n: each.gather(-1, labels[n].to(images.device)[..., None])[..., 0] for n, each in terms.items()}
        said = torch.stack([found["digit"], *(found[n].where(~empty, 0.0) for n in ("ink", "size"))]).sum((0, 2))
        return (said + found["background"]) / (len(PLACES) + 2 * (~empty).sum(1) + 1)


def labels_of(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The classes of B scenes: "digit", "ink" and "size" `[B, 8]`, 0 where no digit is, and "background" `[B]`."""
    labels = {name: torch.zeros(len(scenes), len(PLACES), dtype=torch.long) for name in ("digit", "ink", "size")}
    labels["digit"].fill_(EMPTY)
    columns = list(PLACES)
    for row, scene in enumerate(scenes):
        for numeral, place in zip(scene.numerals, scene.places, strict=True):
            for name, each in labels.items():
                each[row, columns.index(place)] = getattr(numeral, name)
    return {**labels, "background": torch.tensor([scene.background for scene in scenes])}


def reading_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """The sum of the heads' cross-entropies, a scalar; ink and size count where a digit is."""
    empty = labels["digit"] == EMPTY
    labels = {**labels, **{name: labels[name].masked_fill(empty, -100) for name in ("ink", "size")}}
    return torch.stack([F.cross_entropy(each.flatten(0, -2), labels[n].flatten()) for n, each in logits.items()]).sum()


def load_scene_classifier(folder: str | Path | None = None) -> SceneClassifier:
    """The trained classifier in `folder` (by default the embedded one), frozen and in evaluation mode."""
    path = Path(folder or Path(__file__).parent) / "classifier_scenes.safetensors"
    classifier = SceneClassifier()
    classifier.load_state_dict(load_file(path))
    return classifier.eval().requires_grad_(False)
