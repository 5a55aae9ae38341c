"""Backward simulation (DMD2, arXiv 2405.14867): the student samples, and trains on states that it passes through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import Conditioning
from ..schedulers import RdmScheduler

PredictX0 = Callable[[Tensor, Tensor, Conditioning], Tensor]
Place = tuple[int, slice]  # a step of the student, and the samples of one group


@dataclass(frozen=True)
class Step:
    """One step of a rollout of B samples; everything float32 and detached.

    Args:
        k: which step, 0 the noisiest.
        t: its time, a scalar on the CPU.
        x_t: the states `[B, C, H, W]`.
        x0: the predictions there, same shape; those of the grid's last step are the samples.
        mean, std: the next states are N(mean, std^2); std is a scalar on the CPU, 0 in the last step.
    """

    k: int
    t: Tensor
    x_t: Tensor
    x0: Tensor
    mean: Tensor
    std: Tensor

    @property
    def times(self) -> Tensor:
        """`t` for each sample `[B]`, on the samples' device."""
        return times(self.t, self.x_t)


def times(t: Tensor, x_t: Tensor) -> Tensor:
    """A scalar time for each of the samples `x_t [B, ...]`, on their device."""
    return torch.full((len(x_t),), t.item(), dtype=t.dtype, device=x_t.device)


@dataclass(frozen=True)
class Samples:
    """The states that are trained on: M samples, group after group, the G members of a group side by side.

    A group is G samples of one prompt at one step, each with its own noise.

    Args:
        x_t: `[M, C, H, W]`.
        t: times `[M]`.
        x0: the student's detached prediction `[M, C, H, W]`.
        step: which of the student's steps each is, `[M]`, 0 the noisiest; on the CPU.
        conditioning: of length M.
        weight: of each for the fake score `[M]`, about 1 on average (`tilting.py`); None where all count alike.
    """

    x_t: Tensor
    t: Tensor
    x0: Tensor
    step: Tensor
    conditioning: Conditioning
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_t)

    def __getitem__(self, index: Tensor | slice) -> Samples:
        """The chosen samples."""
        weight = None if self.weight is None else self.weight[index]
        return Samples(
            self.x_t[index], self.t[index], self.x0[index], self.step[index], self.conditioning[index], weight
        )

    def repeat(self, copies: int) -> Samples:
        """All samples so many times, one copy of them after the other, `[copies * M, ...]`."""
        if copies == 1:
            return self
        x_t, t, x0, step = (torch.cat([each] * copies) for each in (self.x_t, self.t, self.x0, self.step))
        weight = None if self.weight is None else torch.cat([self.weight] * copies)
        return Samples(x_t, t, x0, step, Conditioning.cat([self.conditioning] * copies), weight)

    def micro_batches(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` samples that cover all."""
        return (slice(start, start + size) for start in range(0, len(self), size))


def take_step(
    predict: PredictX0, scheduler: RdmScheduler, k: int, t: Tensor, x_t: Tensor, conditioning: Conditioning, size: int
) -> Step:
    """The student's step k from the states `x_t` at time `t`, a scalar on the CPU; at most `size` samples at once."""
    parts = [slice(start, start + size) for start in range(0, len(x_t), size)]
    x0 = torch.cat([predict(x_t[part], times(t, x_t[part]), conditioning[part]) for part in parts])
    mean, std = scheduler.transition(x0, x_t, t, scheduler.previous_timestep(t))
    return Step(k, t, x_t, x0, mean, std)


@torch.no_grad()
def rollout(
    predict: PredictX0,
    scheduler: RdmScheduler,
    noise: Iterable[Tensor],
    conditioning: Conditioning,
    *,
    num_steps: int | None = None,
    micro_batch_size: int | None = None,
) -> Iterator[Step]:
    """Yields the student's steps on the scheduler's grid, one by one. No gradients.

    Args:
        predict: `predict(x_t, t, conditioning) -> x0`, the student.
        scheduler: its grid and stochasticity.
        noise: the initial noise and then one tensor per stochastic transition, each `[B, C, H, W]`; each is taken when
            it is needed, and none for what follows the last step.
        conditioning: of length B.
        num_steps: stop after so many steps; all by default.
        micro_batch_size: how many samples go through the student at once; all by default.
    """
    noises, grid = iter(noise), scheduler.timesteps[:num_steps].cpu()
    x_t = next(noises)
    for k, t in enumerate(grid):
        step = take_step(predict, scheduler, k, t, x_t, conditioning, micro_batch_size or len(x_t))
        yield step
        if k + 1 < len(grid):
            x_t = step.mean + step.std * next(noises) if step.std > 0 else step.mean


def draw_samples(
    predict: PredictX0,
    scheduler: RdmScheduler,
    noise: Iterable[Tensor],
    conditioning: Conditioning,
    *,
    micro_batch_size: int | None = None,
) -> Tensor:
    """The student's samples `[B, C, H, W]`: where its `rollout` ends. Arguments as there; no gradients."""
    for step in rollout(predict, scheduler, noise, conditioning, micro_batch_size=micro_batch_size):
        x0 = step.x0
    return x0


def trained_places(steps: Sequence[Sequence[int]], group_size: int) -> list[Place]:
    """Which states are trained on: of the i-th group's G samples those at the steps `steps[i]`, in this order."""
    groups = [slice(i * group_size, (i + 1) * group_size) for i in range(len(steps))]
    return [(k, members) for members, chosen in zip(groups, steps, strict=True) for k in chosen]


def collect_samples(rollout: Iterable[Step], places: Sequence[Place], conditioning: Conditioning) -> Samples:
    """The states of a rollout to train on, collected as they pass.

    Args:
        rollout: its steps, up to the last that `places` names.
        places: as `trained_places` gives them; the samples lie in their order.
        conditioning: of the rollout's samples.
    """
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for step in rollout:
        for i, (k, members) in enumerate(places):
            if k == step.k:
                x_t = step.x_t[members]
                found[i] = x_t, times(step.t, x_t), step.x0[members]
    x_t, t, x0 = (torch.cat(column) for column in zip(*(found[i] for i in range(len(places))), strict=True))
    steps = [k for k, members in places for _ in range(members.start, members.stop)]
    chosen = Conditioning.cat([conditioning[members] for _, members in places])
    return Samples(x_t, t, x0, torch.tensor(steps), chosen)
