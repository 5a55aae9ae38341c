"""Measures picture files: Fréchet distances, rewards, and how well the tiny teachers' pictures show their prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..frechet import distance_with_interval
from ..rewards import Reward, WeightedReward, evaluate, load_distinct_rewards
from ..tiny.domains import DOMAINS, domain_of_captions, reader_of
from .features import Features, Reference, load_features, load_reference
from .pictures import read_batches
from .prompt_sets import prompts_for
from .records import SAMPLED, digest_of_files, digest_of_tensors, digest_of_texts
from .subjects import DTYPES, Options

Batches = Iterable[tuple[Tensor, Sequence[str]]]


@dataclass(frozen=True)
class Measures:
    """What pictures are measured with, loaded."""

    features: Features | None  # None if there is no reference
    references: Mapping[str, Reference]  # by `data` and `teacher`
    rewards: Mapping[str, WeightedReward]  # by their specifications


def load_measures(options: Options, device: torch.device) -> Measures:
    """Loads all; ValueError or ImportError if one cannot be loaded, or if two rewards have one name."""
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
        features = measures.features.of_files(files, device)
        for name, reference in measures.references.items():
            distance = distance_with_interval(features, reference.statistics, len(prompts) or None)
            metrics[f"fd_to_{name}"] = distance.as_dict()
        if measures.features.name in DOMAINS and asked:
            metrics["prompt_accuracy"] = measure_accuracy(files, asked)
    rewards = [weighted.reward for weighted in measures.rewards.values()]
    metrics["rewards"] = {reward.name: measure_reward(files, asked, reward, device) for reward in rewards}
    return metrics


@torch.no_grad()
def measure_reward(
    files: Sequence[Path], prompts: Sequence[str], reward: Reward, device: torch.device | str = "cpu"
) -> dict[str, float | None]:
    """A reward's mean over pictures, its standard error, and the share of values that are not finite and left out.

    Raises:
        ValueError: as `rewards.evaluate`, or if no value is finite.
    """
    return mean_reward(reward, _with_prompts(files, prompts, device, reward.name))


@torch.no_grad()
def mean_reward(reward: Reward, batches: Batches) -> dict[str, float | None]:
    """`measure_reward` of images `[B, 3, H, W]` in [0, 1], each batch with its prompts."""
    values = torch.cat([evaluate(reward, images, asked).cpu().double() for images, asked in batches])
    finite = values[values.isfinite()]
    if not len(finite):
        raise ValueError(f"The reward {reward.name} returned no finite number; fix it or leave it out.")
    error = finite.std().item() / math.sqrt(len(finite)) if len(finite) > 1 else None
    return {"mean": finite.mean().item(), "standard_error": error, "invalid": 1 - len(finite) / len(values)}


@torch.no_grad()
def measure_accuracy(files: Sequence[Path], prompts: Sequence[str]) -> float | None:
    """The share of pictures that show what a tiny teacher's caption asks for; None for any other prompts."""
    return accuracy(_with_prompts(files, prompts)) if domain_of_captions(prompts) else None


@torch.no_grad()
def accuracy(batches: Batches) -> float:
    """`measure_accuracy` of images `[B, 3, S, S]` in [0, 1], each batch with its captions."""
    correct, count = 0, 0
    for images, asked in batches:
        domain = domain_of_captions(asked)
        if domain is None:
            raise ValueError(f"No tiny teacher knows all of these captions: {asked[0]!r}, ...")
        right = reader_of(domain, torch.device("cpu")).correct(images, [domain.parse(prompt) for prompt in asked])
        correct += int(right["all"].sum())
        count += len(images)
    return correct / count


def _with_prompts(
    files: Sequence[Path], prompts: Sequence[str], device: torch.device | str = "cpu", label: str | None = None
) -> Iterator[tuple[Tensor, Sequence[str]]]:
    """Batches of images `[B, 3, H, W]` in [0, 1] with their prompts."""
    done = 0
    for batch in read_batches(files, label):
        yield batch.to(device).float() / 255, prompts[done : done + len(batch)]
        done += len(batch)


def digest_of_reward(spec: str, weighted: WeightedReward) -> str:
    """Distinguishes rewards of one name by some numbers of each of their tensors, and by the file that defines them."""
    reward = weighted.reward
    networks = [part for part in (reward, getattr(reward, "function", None)) if isinstance(part, torch.nn.Module)]
    parts = [digest_of_tensors(network.state_dict(), SAMPLED) for network in networks]
    file = Path(spec.split(":")[0]).expanduser()
    parts += [digest_of_files([file])] if file.suffix == ".py" else []
    return digest_of_texts(parts) if parts else "built in"
