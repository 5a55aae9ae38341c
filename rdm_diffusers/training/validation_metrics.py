"""`--validation_metrics`: the student is measured as it trains, on images of the same prompts and noises every time."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from ..config import RunConfig
from ..config.validation import ACCURACY, DISTANCES, shipped_reference
from ..evaluation.features import Features, load_features, load_reference
from ..evaluation.measuring import Batches, accuracy, mean_reward
from ..evaluation.prompt_sets import PROMPT_SETS, load_prompt_set, prompts_for
from ..families import Conditioning, Teacher
from ..frechet import ENOUGH, FrechetReference, GaussianStatistics
from ..program import one_line
from ..prompts import read_prompts
from ..rewards import Reward, WeightedReward, load_distinct_rewards, reward_networks
from ..tiny import is_tiny
from ..tiny.domains import domain_of, domain_of_captions
from .devices import on_device
from .run import Distillation
from .tracking import log_numbers
from .validation import averaged_student, sample_images

if TYPE_CHECKING:
    from .trainer import Trainer

AT_ONCE = 32  # images that are measured at once
PURPOSE = "validation_metrics"  # of its random numbers


@dataclass(frozen=True)
class ValidationMetrics:
    """What the student is measured with, loaded, and on which prompts.

    Args:
        names: each metric of `--validation_metrics`, and the name of its value; rewards are called by their own.
        prompts: of the images, which are drawn for them in turn.
        num_images: how many.
        features: the network of the distances; None if there are none, as on all processes but the main one.
        references: the distances by their names.
        rewards: by their names; on the CPU, but for those that the training has, too.
        conditioning: of the prompts, on the CPU; None until they are encoded.
    """

    names: dict[str, str]
    prompts: list[str]
    num_images: int
    features: Features | None
    references: dict[str, FrechetReference]
    rewards: dict[str, Reward]
    conditioning: Conditioning | None = None

    @property
    def asked(self) -> list[str]:
        """The prompt of every image."""
        return prompts_for(self.prompts, range(self.num_images))

    def encoded(self, teacher: Teacher, config: RunConfig, device: torch.device) -> ValidationMetrics:
        """The same with the prompts' conditioning, which the text encoders read on the device."""
        size = config.prompts.encode_batch_size
        parts = [self.prompts[start : start + size] for start in range(0, len(self.prompts), size)]
        with on_device(teacher.text_encoders, device):
            read = Conditioning.cat([teacher.encode_prompts(part) for part in parts])
        return replace(self, conditioning=Conditioning({name: each.cpu() for name, each in read.tensors.items()}))


def load_metrics(
    config: RunConfig, prompts: Sequence[str], trained: Sequence[WeightedReward], accelerator: Accelerator
) -> ValidationMetrics | None:
    """Loads all that the metrics need, on the main process; None if there are no metrics.

    Args:
        config: the run's.
        prompts: the run's, which are measured where nothing names others.
        trained: the training's rewards, which are not loaded again.
        accelerator: the run's.

    Raises:
        ValueError, ImportError: one sentence on what cannot be loaded or measured, and what to do.
    """
    asked = config.validation
    if not asked.validation_metrics:
        return None
    chosen = _chosen_prompts(config, prompts)
    if not accelerator.is_main_process:
        return ValidationMetrics({}, chosen, asked.num_validation_metric_images, None, {}, {})
    features, references = _load_distances(config, accelerator.device)
    rewards = _load_rewards(config, trained)
    names = {name: name if name not in rewards else rewards[name].name for name in asked.validation_metrics}
    by_name = {reward.name: reward for reward in rewards.values()}
    return ValidationMetrics(names, chosen, asked.num_validation_metric_images, features, references, by_name)


def _chosen_prompts(config: RunConfig, prompts: Sequence[str]) -> list[str]:
    """The prompts of the images: all, or as many as there are images, spread evenly over them."""
    name, count = config.validation.validation_prompts_file, config.validation.num_validation_metric_images
    teacher = config.teacher.pretrained_model_name_or_path
    found: Sequence[str]
    if name is None:  # the references are of a tiny teacher's captions
        found = domain_of(teacher).captions if is_tiny(teacher) else prompts
    elif name.partition("=")[0] in PROMPT_SETS:
        found = load_prompt_set(name)
    else:
        found = read_prompts(Path(name), "--validation_prompts_file")
    if ACCURACY in config.validation.validation_metrics and domain_of_captions(found) is None:
        raise ValueError(
            f"--validation_metrics {ACCURACY} is known for the tiny teachers' captions alone; leave it or "
            "--validation_prompts_file out."
        )
    return [found[i * len(found) // count] for i in range(count)] if count < len(found) else list(found)


def _load_distances(config: RunConfig, device: torch.device) -> tuple[Features | None, dict[str, FrechetReference]]:
    """The network of the distances and their references, if there are distances."""
    asked, shipped = config.validation, shipped_reference(config)
    if not asked.distances:
        return None, {}
    kinds = [name.removeprefix("fd_to_") for name in asked.distances]
    places = {kind: getattr(asked, f"reference_{kind}") or str(shipped) for kind in kinds}
    own = (domain_of(place).name for place in (shipped, *places.values()) if place and is_tiny(place))
    name = asked.features or next(own, "inception")
    features = load_features(name, asked.feature_weights, device)
    loaded = {kind: load_reference(place, kind, features, device) for kind, place in places.items()}
    if asked.num_validation_metric_images < ENOUGH * features.dimensions:
        print(
            f"note: --num_validation_metric_images {asked.num_validation_metric_images} are few for "
            f"{features.dimensions:,} features, so the Fréchet distances are too large; compare them only with "
            "each other."
        )
    return features, {f"fd_to_{kind}": FrechetReference(each.statistics) for kind, each in loaded.items()}


def _load_rewards(config: RunConfig, trained: Sequence[WeightedReward]) -> dict[str, Reward]:
    """The rewards of the metrics by their specifications."""
    known = dict(zip(config.rewards.reward, trained, strict=True))
    missing = [spec for spec in config.validation.rewards if spec not in known]
    loaded = load_distinct_rewards(missing, "cpu", getattr(torch, config.rewards.reward_dtype))
    found = {spec: loaded[spec] if spec in loaded else known[spec] for spec in config.validation.rewards}
    for spec, weighted in found.items():
        if weighted.weight != 1:
            raise ValueError(f"--validation_metrics {spec} has a weight, which only --reward takes; leave it out.")
    taken = {"update", ACCURACY, *DISTANCES, *(weighted.reward.name for weighted in found.values())}
    if len(taken) < 2 + len(DISTANCES) + len(found):
        raise ValueError(f"The rewards {', '.join(found)} in --validation_metrics need a name each; rename one.")
    return {spec: weighted.reward for spec, weighted in found.items()}


def measure_student(trainer: Trainer) -> dict[str, Any] | None:
    """Draws the metrics' images with the student's average, and measures them. Every process must call.

    The random state that the training goes on with is untouched, and so are the counts of its network calls.

    Returns:
        On the main process the row of this update: `update`, and each metric by its name, None if it is not finite.
        None on the others, without metrics, and after an error of a metric, which becomes a warning.
    """
    run, state, metrics, accelerator = trainer.distillation, trainer.state, trainer.metrics, trainer.accelerator
    if metrics is None or metrics.conditioning is None:
        return None
    with _same_random_state(), averaged_student(run, state):
        set_seed(run.draws.number(PURPOSE, state.update) % 2**32)  # of a reward's own random numbers
        images = draw_measured(run, trainer.teacher, metrics.conditioning, metrics.num_images, accelerator)
        if not accelerator.is_main_process:
            return None
        try:
            row = {"update": state.update, **measure_images(images, metrics, accelerator.device)}
        except Exception as error:  # a reward's own, of whatever kind; the training needs none of it
            said = f"The student of update {state.update} was not measured ({one_line(error)}); the run goes on."
            warnings.warn(said, stacklevel=2)
            return None
    known = {f"validation/{name}": value for name, value in row.items() if name != "update" and value is not None}
    log_numbers(accelerator, known, state.update)
    return row


def draw_measured(
    run: Distillation, teacher: Teacher, conditioning: Conditioning, count: int, accelerator: Accelerator
) -> Tensor:
    """Images `[count, 3, H, W]`, uint8, on the CPU, from noises that only the seed and the image's number decide.

    Processes share the work, unless networks are in shards. Batches are cut at the same places for any number of
    processes, the last one filled up, so that the images are the same.
    """
    size, calls = run.micro_batch_size, run.networks.calls.copy()
    sharing = 1 if run.is_sharded else run.num_processes
    drawn = []
    for first in range(0, count, size * sharing):
        own = first + size * (run.process_index if sharing > 1 else 0)
        images = _draw_batch(run, teacher, conditioning, [i % count for i in range(own, own + size)])
        drawn.append((accelerator.gather(images) if sharing > 1 else images).cpu())
    run.networks.calls.clear()
    run.networks.calls.update(calls)
    return torch.cat(drawn)[:count]


def _draw_batch(run: Distillation, teacher: Teacher, conditioning: Conditioning, indices: list[int]) -> Tensor:
    """The images of these numbers, 8 bits a channel as in a file."""
    generators = [run.draws.generator(PURPOSE, index) for index in indices]
    prompts = torch.tensor([index % len(conditioning) for index in indices])
    chosen = conditioning[prompts].to(run.draws.device, run.prompts.dtype)

    def noise() -> Iterator[Tensor]:
        for _ in range(run.num_steps):
            each = [torch.randn(run.latent_shape, generator=generator) for generator in generators]
            yield torch.stack(each).to(run.draws.device)

    images = sample_images(run, teacher, chosen, noise())
    return (images.clamp(0, 1) * 255).round().byte()


def measure_images(images: Tensor, metrics: ValidationMetrics, device: torch.device) -> dict[str, float | None]:
    """Every metric by its name, in the order of `--validation_metrics`; None where it is not finite.

    Args:
        images: `[N, 3, H, W]`, uint8.
        metrics: with the N prompts.
        device: where the networks work.
    """
    values: dict[str, float | None] = {}
    if metrics.features is not None:
        statistics = GaussianStatistics.of(metrics.features.of_batches(images.split(AT_ONCE), device))
        values |= {name: reference.distance(statistics) for name, reference in metrics.references.items()}
    if ACCURACY in metrics.names:
        values[ACCURACY] = accuracy(_batches(images, metrics.asked, torch.device("cpu")))
    for name, reward in metrics.rewards.items():
        with on_device(reward_networks([reward]), device):
            values[name] = mean_reward(reward, _batches(images, metrics.asked, device))["mean"]
    ordered = {name: values[name] for name in metrics.names.values()}
    return {name: v if v is not None and math.isfinite(v) else None for name, v in ordered.items()}


def _batches(images: Tensor, prompts: Sequence[str], device: torch.device) -> Batches:
    for start in range(0, len(images), AT_ONCE):
        yield images[start : start + AT_ONCE].to(device).float() / 255, prompts[start : start + AT_ONCE]


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Afterwards the global generators, which a user's reward may use, are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
