"""What an update trains on: states of a rollout, fresh or reused, and the weights that rewards give them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from ..distillation import (
    Place,
    RunningMeans,
    Samples,
    Step,
    collect_samples,
    log_ratios,
    revisit,
    rollout,
    trained_places,
)
from ..families import Conditioning
from .run import Distillation


@dataclass(frozen=True)
class WholeRollout:
    """A rollout with all its steps, for importance weights."""

    steps: list[Step]  # as the student took them
    places: list[Place]  # which of their states are the batch's samples
    conditioning: Conditioning  # of the rollout's samples


@dataclass(frozen=True)
class Batch:
    """The M samples of one rollout, with the key of each group-and-step under which its random numbers are drawn."""

    samples: Samples
    keys: list[int]  # one per group and trained step
    prompts: list[str]  # of the same
    visit: int = 0  # how many updates the rollout has served
    rollout: WholeRollout | None = None  # the whole of it, only where importance weights are asked for
    log_ratio: Tensor | None = None  # log p_now - log p_then of reaching each state [M], in nats; where weighed
    reward_strength: float = 1.0  # what the rewards' schedule gives at the update
    target: Tensor | None = None  # what x̂ should be [M, C, H, W]; of consistency distillation alone

    @property
    def sample_prompts(self) -> list[str]:
        """The prompt of every sample, length M."""
        group_size = len(self.samples) // len(self.prompts)
        return [prompt for prompt in self.prompts for _ in range(group_size)]

    def name_of(self, index: int) -> str:
        """The prompt and step of a sample or of a copy of it, for messages."""
        index %= len(self.samples)
        return f"prompt {self.sample_prompts[index]!r}, student step {int(self.samples.step[index]) + 1}"


def collect(run: Distillation, number: int) -> Batch:
    """Rolls the student out for the `number`-th time and collects the states to train on. No gradients."""
    groups = run.groups(number)
    trained = [run.trained_steps(group) for group in groups]
    noise = (run.draws.normal(f"rollout_noise/{k}", groups, run.latent_shape) for k in count())
    conditioning, places = run.prompts.conditioning(groups), trained_places(trained, run.draws.group_size)
    steps: Iterator[Step] | list[Step] = rollout(
        run.student, run.scheduler, noise, conditioning,
        num_steps=run.depth(number), micro_batch_size=run.micro_batch_size,
    )  # fmt: skip
    whole = None
    if run.importance_weighting != "none":
        steps = list(steps)
        whole = WholeRollout(steps, places, conditioning)
    keys = [group * run.num_steps + k for group, chosen in zip(groups, trained, strict=True) for k in chosen]
    prompts = [run.prompts.prompt(group) for group, chosen in zip(groups, trained, strict=True) for _ in chosen]
    return Batch(collect_samples(steps, places, conditioning), keys, prompts, rollout=whole)


@torch.no_grad()
def reuse(run: Distillation, batch: Batch) -> Batch:
    """The same rollout for another update: its states stay, the student's predictions there are made anew."""
    if run.importance_weighting == "none" or batch.rollout is None:
        old = batch.samples
        parts = [old[part] for part in old.micro_batches(run.micro_batch_size)]
        x0 = torch.cat([run.student(part.x_t, part.t, part.conditioning) for part in parts])
        return replace(batch, samples=replace(old, x0=x0), visit=batch.visit + 1)
    then, places, conditioning = batch.rollout.steps, batch.rollout.places, batch.rollout.conditioning
    now = list(revisit(run.student, run.scheduler, then, conditioning, run.micro_batch_size))
    ratios = log_ratios(now, then)
    log_ratio = torch.cat([ratios[k, members] for k, members in places])
    samples = collect_samples(now, places, conditioning)
    return replace(batch, samples=samples, visit=batch.visit + 1, log_ratio=log_ratio)


def weigh_samples(
    run: Distillation, batch: Batch, statistics: RunningMeans, update: int
) -> tuple[Batch, dict[str, Tensor]]:
    """The batch with the weights that rewards without gradients give its samples, if there are any; health numbers.

    It also notes how strong the rewards are at this update.
    """
    if run.rewards is None:
        return batch, {}
    strength = run.rewards.schedule(update)
    samples, health = run.rewards.tilt(batch.samples, batch.sample_prompts, statistics, strength)
    health["reward_strength"] = samples.x0.new_full((), strength)
    return replace(batch, samples=samples, reward_strength=strength), health
