"""What a run is for its updates: networks, objective, prompts and random numbers, which stay the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..distillation import (
    GNDM,
    LCM,
    UNIFORM,
    Draws,
    Renoising,
    TimeDistribution,
)
from ..families import Conditioning
from ..networks import STUDENT, Networks
from ..schedulers import RdmScheduler
from ..sharding import average_in_backward
from .external_rewards import ExternalRewards
from .finite import FiniteChecks
from .loss_scaling import LossScaler, scaled
from .prompts import PromptGroups

if TYPE_CHECKING:
    from .pictures import Pictures


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What the updates need and do not change, made once per run."""

    networks: Networks
    scheduler: RdmScheduler  # the student's sampler on its trained grid
    renoising: Renoising  # where R_dm is estimated, and where the fake score learns
    objective: GNDM | LCM  # turns R_dm, or a consistency target, into a direction
    prompts: PromptGroups
    draws: Draws
    latent_shape: tuple[int, int, int]  # (C, H, W)
    groups_per_update: int  # rollouts per update and process, counted in groups
    steps_per_rollout: int  # how many of a rollout's states are trained on
    micro_batch_size: int  # samples in one forward or backward
    rewards: ExternalRewards | None = None  # join R_dm
    pictures: Pictures | None = None  # of what the student is to learn, where updates read them
    num_renoisings: int = 1  # how many re-noised copies of each x̂ estimate R_dm
    renoising_distribution: TimeDistribution = UNIFORM  # of their times
    fake_distribution: TimeDistribution = UNIFORM  # of the times of the fake score's loss
    guidance_range: tuple[float, ...] = ()  # between which the teacher's scale is drawn; () for the networks' own
    decoupled_guidance: bool = False  # whether the guidance's part of R_dm is estimated at times of its own
    guidance_cls_loss_weight: float = 0.0  # of the discriminator's loss, beside the fake score's
    importance_weighting: str = "none"  # of `IMPORTANCE_WEIGHTINGS`, for rollouts that serve several updates
    process_index: int = 0
    num_processes: int = 1  # a group stays whole on one process
    is_sharded: bool = False  # whether a network call needs all processes
    sync_each_batch: bool = False  # whether sharded gradients are averaged after every micro-batch
    checks: FiniteChecks = field(default_factory=FiniteChecks)  # what the next optimiser's step waits for
    buckets: tuple[Distillation, ...] = ()  # this run at each of several sizes, of which every rollout has one
    scalers: dict[str, LossScaler] = field(default_factory=dict)  # of the roles whose gradients are float16

    @property
    def num_steps(self) -> int:
        """K, the student's number of steps."""
        return len(self.scheduler.timesteps)

    def student(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The student's x0 `[B, C, H, W]`."""
        return self.networks.predict(STUDENT, x_t, t, conditioning)

    def of_rollout(self, number: int) -> Distillation:
        """This run at the size of its `number`-th rollout, on all processes: each bucket in turn, in drawn orders."""
        if not self.buckets:
            return self
        count = len(self.buckets)
        order = torch.randperm(count, generator=self.draws.generator("buckets", number // count))
        return self.buckets[int(order[number % count])]

    def groups(self, number: int) -> range:
        """The groups of this process in the `number`-th rollout; no two rollouts or processes share one."""
        first = (number * self.num_processes + self.process_index) * self.groups_per_update
        return range(first, first + self.groups_per_update)

    def depth(self, number: int) -> int:
        """How many steps the `number`-th rollout takes here: up to the last state that this process trains on.

        Where networks are in shards, it is the last of any process, as all must make equally many network calls.
        """
        size = self.groups_per_update * self.num_processes
        groups = range(number * size, (number + 1) * size) if self.is_sharded else self.groups(number)
        return max(self.trained_steps(group)[-1] for group in groups) + 1

    def trained_steps(self, group: int) -> list[int]:
        """Which of a group's states are trained on, ascending."""
        return self.draws.subset("executed_steps", group, self.steps_per_rollout, self.num_steps)

    def backward(
        self, role: str, x0: Tensor, direction: Tensor, part: slice, count: int, *more: tuple[Tensor, Tensor]
    ) -> None:
        """`Networks.backward` of a part of an update's `count` samples; the last part averages sharded gradients."""
        for network in self.networks.modules:
            average_in_backward(network, self.sync_each_batch or part.stop >= count)
        scaler = self.scalers.get(role)
        others = ((output, scaled(each, scaler)) for output, each in more)
        self.networks.backward(role, x0, scaled(direction, scaler), *others)
