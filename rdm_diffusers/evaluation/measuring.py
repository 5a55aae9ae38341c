"""What pictures in files are worth: distances, rewards, faithfulness to prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rewards import Reward, evaluate
from ..tiny.captions import CAPTIONS, parse_caption
from ..tiny.classifier import load_classifier
from .features import Features
from .image_files import read_batches
from .intervals import distance_with_interval
from .references import Reference


def measure_distances(
    files: Sequence[Path],
    features: Features,
    references: Mapping[str, Reference],
    num_prompts: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The Fréchet distances of pictures, `fd_to_data` and the like by the references' names, with their intervals.

    Args:
        files: pictures; the i-th was drawn for prompt i modulo `num_prompts`.
        features: the network.
        references: by name.
        num_prompts: how many different prompts there are; None if unknown.
        device: where the network works.

    Raises:
        ValueError: as `read_batches` and `distance_with_interval`.
    """
    if not references:
        return {}
    found = features.of_files(files, device)
    return {
        f"fd_to_{name}": distance_with_interval(found, reference.statistics, num_prompts).as_dict()
        for name, reference in references.items()
    }


@torch.no_grad()
def measure_reward(
    files: Sequence[Path], prompts: Sequence[str], reward: Reward, device: torch.device | str = "cpu"
) -> dict[str, float | None]:
    """A reward's mean over pictures and its standard error; what is not finite is left out and counted.

    Raises:
        ValueError: as `rewards.evaluate`.
    """
    scores: list[Tensor] = []
    done = 0
    for batch in read_batches(files, reward.name):
        images = batch.to(device).float() / 255
        scores.append(evaluate(reward, images, prompts[done : done + len(batch)]).double().cpu())
        done += len(batch)
    values = torch.cat(scores)
    finite = values[values.isfinite()]
    if not len(finite):
        raise ValueError(f"The reward {reward.name} gave no finite number; mend it or leave it out.")
    error = finite.std().item() / math.sqrt(len(finite)) if len(finite) > 1 else None
    return {"mean": finite.mean().item(), "standard_error": error, "invalid": 1 - len(finite) / len(values)}


@torch.no_grad()
def measure_accuracy(files: Sequence[Path], prompts: Sequence[str]) -> float | None:
    """The share of a tiny teacher's pictures that show what is asked; None for other prompts than its captions."""
    if not set(prompts) <= set(CAPTIONS):
        return None
    classifier, right, done = load_classifier(), 0, 0
    for batch in read_batches(files):
        asked = [parse_caption(prompt) for prompt in prompts[done : done + len(batch)]]
        right += int(classifier.correct(batch.float() / 255, asked)["all"].sum())
        done += len(batch)
    return right / len(files)
