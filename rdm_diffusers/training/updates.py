"""The two updates of one training step, on the samples of one rollout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..distillation import (
    GNDM,
    UNIFORM,
    Draws,
    Place,
    RunningMeans,
    Samples,
    Step,
    TimeDistribution,
    ascent,
    collect_samples,
    estimate_reward,
    fake_score_direction,
    guidance_times,
    importance_health,
    importance_weights,
    log_ratios,
    renoising_times,
    revisit,
    rollout,
    trained_places,
)
from ..families import Conditioning
from ..networks import FAKE_SCORE, STUDENT, Networks
from ..prediction import NoiseSchedule, denoising_weight, expand
from ..schedulers import RdmScheduler
from ..sharding import average_in_backward
from .external_rewards import ExternalRewards
from .finite import FiniteChecks
from .loss_scaling import LossScaler, scaled
from .monitor import batch_health, contrast, fake_loss_health
from .prompts import PromptGroups

if TYPE_CHECKING:
    from .pictures import Pictures


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What the updates need and do not change, made once per run."""

    networks: Networks
    scheduler: RdmScheduler  # the student's sampler on its trained grid
    objective: GNDM  # turns R_dm into a direction
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
    decoupled_guidance: bool = False  # whether the guidance's part of R_dm is estimated at times of its own
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

    def backward(self, role: str, x0: Tensor, direction: Tensor, part: slice, count: int) -> None:
        """`Networks.backward` of a part of an update's `count` samples; the last part averages sharded gradients."""
        for network in self.networks.modules:
            average_in_backward(network, self.sync_each_batch or part.stop >= count)
        self.networks.backward(role, x0, scaled(direction, self.scalers.get(role)))


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


def student_update(run: Distillation, batch: Batch, statistics: RunningMeans) -> dict[str, Tensor]:
    """Accumulates the student's gradients: a direction for all samples first, then one backward per micro-batch.

    The method's running means (`statistics`) are updated. Returns the health numbers, scalars. What must be finite is
    noted in `run.checks`, which the optimiser's step requires.
    """
    samples, copies = batch.samples, run.num_renoisings
    draws = [batch.visit * copies + copy for copy in range(copies)]
    schedule = run.networks.schedule
    uniform, noise = _draw(run, batch, "tau", draws)
    tau, all_samples = renoising_times(uniform, schedule, run.renoising_distribution), samples.repeat(copies)
    guidance = None
    if run.decoupled_guidance:
        uniform, guidance_noise = _draw(run, batch, "guidance", draws)
        guidance = guidance_times(uniform, all_samples.t, schedule), guidance_noise
    estimate = estimate_reward(run.networks, all_samples, tau, noise, run.micro_batch_size, guidance)
    advantage = run.objective.advantage(estimate, statistics)
    move = ascent(run.networks, all_samples, estimate, advantage.pull, run.micro_batch_size)
    run.checks.note("R_dm", move, batch.name_of)
    move = move.unflatten(0, (copies, len(samples))).mean(0)
    health = batch_health(estimate, advantage, run.draws.group_size) | {"contrast": contrast(samples, run.num_steps)}
    if run.rewards is not None:
        given = (batch.sample_prompts, statistics, batch.reward_strength)
        move, reward_health = run.rewards.join(move, samples, *given)
        health |= reward_health
    if batch.log_ratio is not None:
        weights = importance_weights(batch.log_ratio, run.importance_weighting).to(move.device)
        move = expand(weights, move) * move
        health |= importance_health(batch.log_ratio)
    direction = -move / move.numel()
    run.checks.note("student direction", direction, batch.name_of)
    for part in samples.micro_batches(run.micro_batch_size):
        chunk = samples[part]
        x0 = run.student(chunk.x_t, chunk.t, chunk.conditioning)
        run.backward(STUDENT, x0, direction[part], part, len(samples))
    return health


def _draw(run: Distillation, batch: Batch, purpose: str, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Uniform numbers `[N * M]` and noises `[N * M, C, H, W]` for N copies of a batch, by their numbers."""
    uniform = torch.cat([run.draws.uniform(f"{purpose}/{n}", batch.keys) for n in numbers])
    return uniform, torch.cat([run.draws.normal(f"{purpose}_noise/{n}", batch.keys, run.latent_shape) for n in numbers])


def fake_score_update(run: Distillation, batch: Batch, repeat: int) -> dict[str, Tensor]:
    """Accumulates the fake score's gradients: its denoising loss on the same samples, at fresh times and noises.

    `repeat` says which of the rollout's fake-score updates this is. That the losses must be finite is noted in
    `run.checks`, which the optimiser's step requires.
    """
    samples, schedule = batch.samples, run.networks.schedule
    t = denoising_times(run.draws.uniform(f"fake_time/{repeat}", batch.keys), schedule, run.fake_distribution)
    noise = run.draws.normal(f"fake_noise/{repeat}", batch.keys, run.latent_shape)
    x_t = schedule.add_noise(samples.x0, noise, t)
    weight = denoising_weight(schedule.sigma(t))
    if samples.weight is not None:
        weight = weight * samples.weight
    losses = []
    for part in samples.micro_batches(run.micro_batch_size):
        chunk = samples[part]
        x0 = run.networks.predict(FAKE_SCORE, x_t[part], t[part], chunk.conditioning, chunk.step)
        direction, loss = fake_score_direction(x0, chunk.x0, weight[part], len(samples))
        run.backward(FAKE_SCORE, x0, direction, part, len(samples))
        losses.append(loss)
    run.checks.note("fake score loss", torch.cat(losses), batch.name_of)
    return fake_loss_health(torch.cat(losses), t / schedule.num_train_timesteps)


def denoising_times(uniform: Tensor, schedule: NoiseSchedule, distribution: TimeDistribution = UNIFORM) -> Tensor:
    """Times of a denoising loss `[B]`, from uniform numbers in [0, 1): distributed over all training timesteps.

    For flow matching they are never quite 0, where the output is undefined.
    """
    t = distribution.shares(uniform) * schedule.num_train_timesteps
    return t.clamp(min=1e-3 * schedule.num_train_timesteps) if schedule.is_flow else t.long()
