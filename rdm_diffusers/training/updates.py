"""The two updates of one training step, on samples that one rollout gave to both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..distillation import (
    GNDM,
    Draws,
    RunningMeans,
    Samples,
    Trajectory,
    estimate_reward,
    executed_index,
    executed_samples,
    fake_score_direction,
    importance_health,
    importance_weights,
    log_ratios,
    renoising_times,
    revisit,
    rollout,
)
from ..families import Conditioning
from ..networks import FAKE_SCORE, STUDENT, Networks
from ..prediction import expand, output_weight
from ..schedulers import RdmScheduler
from .external_rewards import ExternalRewards
from .monitor import batch_health, contrast, fake_loss_health
from .optimizers import NonFiniteError
from .prompts import PromptGroups


@dataclass(frozen=True)
class Distillation:
    """What the updates need and do not change, gathered once per run.

    Args:
        networks: the roles.
        scheduler: the student's sampler on its trained grid.
        objective: R_dm to direction.
        prompts: the groups' prompts.
        draws: the run's randomness.
        latent_shape: `(C, H, W)`.
        groups_per_update: rollouts per update and process, counted in groups.
        steps_per_rollout: how many of a rollout's states are trained on.
        micro_batch_size: samples in one forward or backward.
        rewards: external rewards that join R_dm, if any.
        num_renoisings: how many re-noised copies of each x̂ estimate R_dm.
        importance_weighting: one of `distillation.IMPORTANCE_WEIGHTINGS`, for rollouts that serve several updates.
        process_index, num_processes: this process's place; a group stays whole on one process.
    """

    networks: Networks
    scheduler: RdmScheduler
    objective: GNDM
    prompts: PromptGroups
    draws: Draws
    latent_shape: tuple[int, int, int]
    groups_per_update: int
    steps_per_rollout: int
    micro_batch_size: int
    rewards: ExternalRewards | None = None
    num_renoisings: int = 1
    importance_weighting: str = "none"
    process_index: int = 0
    num_processes: int = 1

    @property
    def num_steps(self) -> int:
        """K, the student's number of steps."""
        return len(self.scheduler.timesteps)

    def student(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The student's x0 `[B, C, H, W]`."""
        return self.networks.predict(STUDENT, x_t, t, conditioning)

    def groups(self, rollout: int) -> range:
        """The numbers of the groups that this process rolls out; no two rollouts or processes share one."""
        first = (rollout * self.num_processes + self.process_index) * self.groups_per_update
        return range(first, first + self.groups_per_update)

    def depth(self, rollout: int) -> int:
        """How many steps a rollout goes: to the last state that any process trains on.

        So all of them make as many network calls, which they must where they share the weights' shards.
        """
        size = self.groups_per_update * self.num_processes
        return max(self.executed_steps(group)[-1] for group in range(rollout * size, (rollout + 1) * size)) + 1

    def executed_steps(self, group: int) -> list[int]:
        """Which of a group's states are trained on, ascending."""
        return self.draws.subset("executed_steps", group, self.steps_per_rollout, self.num_steps)


@dataclass(frozen=True)
class Batch:
    """The samples of one rollout, with the key of each group-and-step under which its random numbers are drawn.

    Args:
        samples: M samples.
        keys: one per group and executed step.
        prompts: of the same.
        trajectory: the rollouts that the samples were picked from, as the student made them.
        conditioning: of the rollouts.
        index: which of the trajectory's states the samples are (`executed_index`).
        visit: how many updates the rollout has served.
        log_ratio: log p_now - log p_then of reaching each state `[M]`, in nats; None where nobody asked.
    """

    samples: Samples
    keys: list[int]
    prompts: list[str]
    trajectory: Trajectory
    conditioning: Conditioning
    index: tuple[Tensor, Tensor]
    visit: int = 0
    log_ratio: Tensor | None = None

    @property
    def sample_prompts(self) -> list[str]:
        """The prompt of every sample, length M."""
        group_size = len(self.samples) // len(self.prompts)
        return [prompt for prompt in self.prompts for _ in range(group_size)]

    def named(self, index: int) -> str:
        """The prompt and step of a sample, for messages."""
        return f"prompt {self.sample_prompts[index]!r}, student step {int(self.samples.step[index]) + 1}"


def collect(run: Distillation, number: int) -> Batch:
    """Rolls the student out for the `number`-th time and picks the states to train on. No gradients."""
    groups = run.groups(number)
    steps, depth = [run.executed_steps(group) for group in groups], run.depth(number)
    noise = [run.draws.normal(f"rollout_noise/{k}", groups, run.latent_shape) for k in range(depth)]
    noise.append(torch.zeros_like(noise[0]))  # of the transition out of the last step, which nobody reads
    conditioning = run.prompts.conditioning(groups)
    trajectory = rollout(run.student, run.scheduler, noise, conditioning, depth, run.micro_batch_size)
    keys = [g * run.num_steps + k for g, chosen in zip(groups, steps, strict=True) for k in chosen]
    prompts = [run.prompts.prompt(g) for g, chosen in zip(groups, steps, strict=True) for _ in chosen]
    index = executed_index(steps, run.draws.group_size, noise[0].device)
    samples = executed_samples(trajectory, index, conditioning)
    return Batch(samples, keys, prompts, trajectory, conditioning, index)


@torch.no_grad()
def reuse(run: Distillation, batch: Batch) -> Batch:
    """The same rollout for another update: its states stay, the student's predictions there are made anew."""
    if run.importance_weighting == "none":
        old = batch.samples
        parts = [old[part] for part in old.micro_batches(run.micro_batch_size)]
        x0 = torch.cat([run.student(part.x_t, part.t, part.conditioning) for part in parts])
        return replace(batch, samples=replace(old, x0=x0), visit=batch.visit + 1)
    now = revisit(run.student, run.scheduler, batch.trajectory, batch.conditioning, run.micro_batch_size)
    samples = executed_samples(now, batch.index, batch.conditioning)
    ratio = log_ratios(now, batch.trajectory)[batch.index]
    return replace(batch, samples=samples, visit=batch.visit + 1, log_ratio=ratio)


def judge(run: Distillation, batch: Batch, statistics: RunningMeans) -> tuple[Batch, dict[str, Tensor]]:
    """Asks the rewards that tilt the target, if there are any; the batch with its weights, and the health numbers."""
    if run.rewards is None:
        return batch, {}
    samples, health = run.rewards.tilted(batch.samples, batch.sample_prompts, statistics)
    return replace(batch, samples=samples), health


def student_update(run: Distillation, batch: Batch, statistics: RunningMeans) -> dict[str, Tensor]:
    """Accumulates the student's gradients: a direction for all samples first, then one backward per micro-batch.

    Args:
        run: what stays the same.
        batch: M samples.
        statistics: the method's running means; updated.

    Returns:
        The health numbers, scalars.

    Raises:
        NonFiniteError: if the direction is not finite; no gradient has been touched then.
    """
    samples, copies = batch.samples, run.num_renoisings
    draws = [batch.visit * copies + copy for copy in range(copies)]
    tau = torch.cat([renoising_times(run.draws.uniform(f"tau/{n}", batch.keys), run.networks.schedule) for n in draws])
    noise = torch.cat([run.draws.normal(f"tau_noise/{n}", batch.keys, run.latent_shape) for n in draws])
    copied = samples[torch.arange(len(samples), device=tau.device).repeat(copies)]
    estimate = estimate_reward(run.networks, copied, tau, noise, run.micro_batch_size)
    advantage = run.objective.advantage(estimate, statistics)
    _require_finite("R_dm", advantage.value, batch)
    ascent = advantage.value.unflatten(0, (copies, len(samples))).mean(0)
    health = batch_health(estimate, advantage, run.draws.group_size) | {"contrast": contrast(samples, run.num_steps)}
    if run.rewards is not None:
        ascent, reward_health = run.rewards.join(
            ascent, samples, batch.sample_prompts, batch.keys, statistics, batch.visit
        )
        health |= reward_health
    if batch.log_ratio is not None:
        ascent = expand(importance_weights(batch.log_ratio, run.importance_weighting), ascent) * ascent
        health |= importance_health(batch.log_ratio)
    direction = -ascent / ascent.numel()
    _require_finite("student direction", direction, batch)
    for part in samples.micro_batches(run.micro_batch_size):
        chunk = samples[part]
        run.networks.backward(STUDENT, run.student(chunk.x_t, chunk.t, chunk.conditioning), direction[part])
    return health


def fake_score_update(run: Distillation, batch: Batch, repeat: int) -> dict[str, Tensor]:
    """Accumulates the fake score's gradients: its denoising loss on the same samples, at fresh times and noises.

    Args:
        repeat: which of the rollout's fake-score updates this is.

    Raises:
        NonFiniteError: if the loss is not finite.
    """
    samples, schedule = batch.samples, run.networks.schedule
    uniform = run.draws.uniform(f"fake_time/{repeat}", batch.keys)
    t = _training_times(uniform, schedule)
    noise = run.draws.normal(f"fake_noise/{repeat}", batch.keys, run.latent_shape)
    x_t = schedule.add_noise(samples.x0, noise, t)
    weight = output_weight(run.networks.prediction_type, schedule.alpha(t), schedule.sigma(t))
    if samples.weight is not None:
        weight = weight * samples.weight
    losses = []
    for part in samples.micro_batches(run.micro_batch_size):
        chunk = samples[part]
        x0 = run.networks.predict(FAKE_SCORE, x_t[part], t[part], chunk.conditioning, chunk.step)
        direction, loss = fake_score_direction(x0, chunk.x0, weight[part], len(samples))
        _require_finite("fake score loss", loss, batch, part.start)
        run.networks.backward(FAKE_SCORE, x0, direction)
        losses.append(loss)
    return fake_loss_health(torch.cat(losses), t / schedule.num_train_timesteps)


def _training_times(uniform: Tensor, schedule) -> Tensor:
    """Uniform over all training timesteps; for flow, never quite 0, where the output is undefined."""
    t = uniform * schedule.num_train_timesteps
    return t.clamp(min=1e-3 * schedule.num_train_timesteps) if schedule.is_flow else t.long()


def _require_finite(term: str, values: Tensor, batch: Batch, offset: int = 0) -> None:
    if values.isfinite().all():
        return
    finite = values.isfinite().flatten(1).all(1) if values.ndim > 1 else values.isfinite()
    first = (offset + int((~finite).nonzero()[0, 0])) % len(batch.samples)
    raise NonFiniteError(
        f"The {term} is not finite for {batch.named(first)}; nothing was saved over the last checkpoint. Resume from "
        "it with a lower learning rate."
    )
