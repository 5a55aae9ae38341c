"""What a user's own code can do while a run trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from .trainer import Trainer


class Callback:
    """Methods that a `Trainer` calls; a subclass overrides those it needs.

    `trainer.state.update` counts the updates that are done, and `trainer.stop()` ends the training after this one.
    """

    def on_update(self, trainer: Trainer, health: Mapping[str, float]) -> None:
        """After each update, on every process; `health` is its own health numbers, as the trackers name them."""

    def on_validation(self, trainer: Trainer, picture: Image.Image) -> None:
        """After each grid of pictures, on the main process."""

    def on_checkpoint(self, trainer: Trainer, checkpoint: Path) -> None:
        """After each checkpoint is whole on the disk, on every process."""
