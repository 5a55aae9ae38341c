"""What all rewards with a pretrained network share: batches, devices, and transformers' models from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .user_file import reason
from .weights import check_tensors

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


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


def from_transformers(reward: str, cls: type, place: Path | str, dtype: torch.dtype, **options: Any) -> Any:
    """A model out of a folder that transformers saved, or out of a Hub repository.

    Raises:
        ValueError: if it is not there, or its weights are not all of this architecture's.
    """
    with _loading(reward, place):
        model, said = cls.from_pretrained(place, dtype=dtype, output_loading_info=True, **options)  # type: ignore[attr-defined]
    wrong = sorted(said["missing_keys"]) + sorted(str(entry[0]) for entry in said["mismatched_keys"])
    if wrong:
        raise ValueError(
            f"The weights {place} are not those of the reward {reward} (missing or of another shape: "
            f"{', '.join(wrong[:3])}); give its own folder."
        )
    return model


def from_tensors(
    reward: str, cls: type, config: Any, tensors: dict[str, Tensor], place: Path, dtype: torch.dtype, **options: Any
) -> Any:
    """A transformers model of a configuration, with these weights.

    Raises:
        ValueError: if names or shapes are not the model's.
    """
    with torch.device("meta"):
        check_tensors(reward, place, cls(config, **options), tensors)
    return cls.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **options)  # type: ignore[attr-defined]


def load_tokenizer(reward: str, cls: type, place: Path | None, default: str, vocab_size: int) -> Any:
    """The tokenizer beside the weights if there is one, else the Hub's.

    Args:
        reward: its name, for errors.
        cls: transformers' class.
        place: file or folder of the weights; None if they came from the Hub.
        default: the Hub id.
        vocab_size: how many tokens the model knows.

    Raises:
        ValueError: if there is neither, or if it is of another model.
    """
    folder = place if place is None or place.is_dir() else place.parent
    beside = folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES)
    source = folder if beside else default
    try:
        tokenizer = cls.from_pretrained(source)  # type: ignore[attr-defined]
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ValueError("it has no words")  # transformers 5 gives an empty one where it finds no files
    except Exception as error:  # of many kinds: no network, no such file, a file of another kind
        raise ValueError(
            f"The reward {reward} needs the tokenizer of {default}, which could not be loaded from {source} "
            f"({reason(error)}); connect to the network, or put its files ({' or '.join(TOKENIZER_FILES)}) beside "
            "the weights."
        ) from error
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer of {source} has {len(tokenizer)} tokens, the reward {reward} knows {vocab_size}; put its "
            "own tokenizer beside the weights."
        )
    return tokenizer


@contextmanager
def _loading(reward: str, place: Path | str):
    """Turns what goes wrong in transformers into one sentence."""
    try:
        yield
    except Exception as error:  # of many kinds: no network, no such file, a file of another kind
        raise ValueError(
            f"The model {place} of the reward {reward} could not be loaded ({reason(error)}); connect to the network, "
            f"or name a folder that holds config.json and its weights: --reward {reward}=/path/to/folder."
        ) from error
