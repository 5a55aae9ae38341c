"""Backward simulation (DMD2, arXiv 2405.14867): the student samples, and we keep the states it passed through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..families import Conditioning
from ..schedulers import RdmScheduler

PredictX0 = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class Trajectory:
    """What the student did, one entry per step k of K for each of B samples.

    Args:
        x_t: the states `[K, B, C, H, W]`, float32.
        t: their times `[K]`.
        x0: the student's predictions there `[K, B, C, H, W]`, float32, detached.
        mean, std: the transitions' means `[K, B, C, H, W]` and standard deviations `[K]`.
        next: the samples drawn from them `[K, B, C, H, W]`; the last is the picture.
    """

    x_t: Tensor
    t: Tensor
    x0: Tensor
    mean: Tensor
    std: Tensor
    next: Tensor


@dataclass(frozen=True)
class Samples:
    """The states that are trained on: M samples, group after group, the G members of a group side by side.

    A group is G samples of one prompt at the same executed step, each with its own noise.

    Args:
        x_t: `[M, C, H, W]`.
        t: times `[M]`.
        x0: the student's detached prediction `[M, C, H, W]`.
        step: which of the student's steps each is, `[M]`, 0 the noisiest.
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
        picked = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "weight"}
        weight = None if self.weight is None else self.weight[index]
        return Samples(**{name: value[index] for name, value in picked.items()}, weight=weight)

    def micro_batches(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` samples that cover all."""
        return (slice(start, start + size) for start in range(0, len(self), size))


def predict_in_parts(predict: PredictX0, state: Tensor, t: Tensor, conditioning: Conditioning, size: int) -> Tensor:
    """x0 of states `[B, C, H, W]` at one time `t`, at most `size` samples at once."""
    parts = [slice(start, start + size) for start in range(0, len(state), size)]
    return torch.cat([predict(state[part], t.expand(len(state[part])), conditioning[part]) for part in parts])


@torch.no_grad()
def rollout(
    predict: PredictX0,
    scheduler: RdmScheduler,
    noise: Sequence[Tensor],
    conditioning: Conditioning,
    num_steps: int | None = None,
    micro_batch_size: int | None = None,
) -> Trajectory:
    """Samples with the student on the scheduler's grid. No gradients.

    Args:
        predict: `predict(x_t, t, conditioning) -> x0`, the student.
        scheduler: its grid and stochasticity.
        noise: the initial noise and then one tensor per stochastic transition, each `[B, C, H, W]`.
        conditioning: of length B.
        num_steps: stop after so many steps; all by default.
        micro_batch_size: how many samples go through the student at once; all by default.
    """
    grid = scheduler.timesteps[:num_steps].to(noise[0].device)
    size = micro_batch_size or len(noise[0])
    state, steps = noise[0], []
    for k, t in enumerate(grid):
        x0 = predict_in_parts(predict, state, t, conditioning, size)
        mean, std = scheduler.transition(x0, state, t, scheduler.previous_timestep(t).to(t.device))
        following = mean + std * noise[k + 1] if std > 0 else mean
        steps.append((state, t, x0, mean, std, following))
        state = following
    return Trajectory(*(torch.stack(column) for column in zip(*steps, strict=True)))


def executed_index(
    steps: Sequence[Sequence[int]], group_size: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Which states are trained on: of the i-th group's G samples, those at the steps `steps[i]`.

    Returns:
        The steps k and the samples b, both `[sum(len(s) for s in steps) * G]`, laid out as `Samples` says.
    """
    k = torch.tensor([step for group in steps for step in group], device=device).repeat_interleave(group_size)
    members = [
        torch.arange(i * group_size, (i + 1) * group_size, device=device)
        for i, group in enumerate(steps)
        for _ in group
    ]
    return k, torch.cat(members)


def executed_samples(trajectory: Trajectory, index: tuple[Tensor, Tensor], conditioning: Conditioning) -> Samples:
    """Picks the states to train on by `executed_index`; `conditioning` is the rollouts' own."""
    k, b = index
    return Samples(trajectory.x_t[k, b], trajectory.t[k], trajectory.x0[k, b], k, conditioning[b])
