"""Measures picture files: Fréchet distances, rewards, and how well the tiny teachers' pictures show their prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rewards import Reward, WeightedReward, evaluate, load_distinct_rewards
from ..tiny.captions import CAPTIONS, parse_caption
from ..tiny.classifier import load_classifier
from .digests import SAMPLED, digest_of_files, digest_of_tensors, digest_of_texts
from .features import Features, load_features
from .intervals import distance_with_interval
from .pictures import read_batches
from .prompt_sets import prompts_for
from .references import Reference, load_reference
from .subjects import DTYPES


@dataclass(frozen=True)
class MeasuringOptions:
    """What pictures are measured with.

    Args:
        reference_data, reference_teacher: places as in `load_reference`; None for no such distance.
        features: one of `FEATURES`.
        feature_weights: the Inception weights' file; None to download them.
        reward: specifications of rewards.
        reward_dtype: one of `DTYPES`, of pretrained rewards' weights.
    """

    reference_data: str | None
    reference_teacher: str | None
    features: str
    feature_weights: str | None
    reward: Sequence[str]
    reward_dtype: str


@dataclass(frozen=True)
class Measures:
    """What pictures are measured with, loaded.

    Args:
        features: None if there is no reference.
        references: by `data` and `teacher`.
        rewards: by their specifications.
    """

    features: Features | None
    references: Mapping[str, Reference]
    rewards: Mapping[str, WeightedReward]


def load_measures(options: MeasuringOptions, device: torch.device) -> Measures:
    """Loads features, references and rewards.

    Raises:
        ValueError, ImportError: if one cannot be loaded, or if two rewards have one name.
    """
    rewards = load_distinct_rewards(options.reward, device, DTYPES[options.reward_dtype])
    places = {"data": options.reference_data, "teacher": options.reference_teacher}
    if not any(places.values()):
        return Measures(None, {}, rewards)
    features = load_features(options.features, options.feature_weights, device)
    references = {kind: load_reference(place, kind, features, device) for kind, place in places.items() if place}
    return Measures(features, references, rewards)


def measure_files(
    files: Sequence[Path], prompts: Sequence[str], measures: Measures, device: torch.device
) -> dict[str, Any]:
    """All measurements of pictures; picture i belongs to prompt i modulo the number of prompts, which may be 0."""
    asked = prompts_for(prompts, range(len(files))) if prompts else []
    metrics: dict[str, Any] = {"num_images": len(files)}
    if measures.features is not None:
        metrics |= measure_distances(files, measures.features, measures.references, len(prompts) or None, device)
        if measures.features.name == "tiny" and asked:
            metrics["prompt_accuracy"] = measure_accuracy(files, asked)
    rewards = [weighted.reward for weighted in measures.rewards.values()]
    metrics["rewards"] = {reward.name: measure_reward(files, asked, reward, device) for reward in rewards}
    return metrics


def measure_distances(
    files: Sequence[Path],
    features: Features,
    references: Mapping[str, Reference],
    num_prompts: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The Fréchet distances of pictures with their intervals, named `fd_to_data` and the like by the references' names.

    Raises:
        ValueError: as `read_batches` and `distance_with_interval`.
    """
    if not references:
        return {}
    extracted = features.of_files(files, device)
    return {
        f"fd_to_{name}": distance_with_interval(extracted, reference.statistics, num_prompts).as_dict()
        for name, reference in references.items()
    }


@torch.no_grad()
def measure_reward(
    files: Sequence[Path], prompts: Sequence[str], reward: Reward, device: torch.device | str = "cpu"
) -> dict[str, float | None]:
    """A reward's mean over pictures, its standard error, and the share of values that are not finite and left out.

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
        raise ValueError(f"The reward {reward.name} returned no finite number; fix it or leave it out.")
    error = finite.std().item() / math.sqrt(len(finite)) if len(finite) > 1 else None
    return {"mean": finite.mean().item(), "standard_error": error, "invalid": 1 - len(finite) / len(values)}


@torch.no_grad()
def measure_accuracy(files: Sequence[Path], prompts: Sequence[str]) -> float | None:
    """The share of pictures that show what a tiny teacher's caption asks for; None for any other prompts."""
    if not set(prompts) <= set(CAPTIONS):
        return None
    classifier, correct, done = load_classifier(), 0, 0
    for batch in read_batches(files):
        asked = [parse_caption(prompt) for prompt in prompts[done : done + len(batch)]]
        correct += int(classifier.correct(batch.float() / 255, asked)["all"].sum())
        done += len(batch)
    return correct / len(files)


def digest_of_reward(spec: str, weighted: WeightedReward) -> str:
    """Distinguishes rewards of one name by some numbers of each of their tensors, and by the file that defines them."""
    reward = weighted.reward
    networks = [part for part in (reward, getattr(reward, "function", None)) if isinstance(part, torch.nn.Module)]
    parts = [digest_of_tensors(network.state_dict(), SAMPLED) for network in networks]
    file = Path(spec.split(":")[0]).expanduser()
    parts += [digest_of_files([file])] if file.suffix == ".py" else []
    return digest_of_texts(parts) if parts else "built in"
