"""The two updates of one training step, on samples that one rollout gave to both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distillation import (
    GNDM,
    Draws,
    RewardEstimate,
    Samples,
    estimate_reward,
    executed_samples,
    fake_score_direction,
    renoising_times,
    rollout,
)
from ..networks import FAKE_SCORE, STUDENT, Networks
from ..prediction import output_weight
from ..schedulers import RdmScheduler
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
    process_index: int = 0
    num_processes: int = 1

    @property
    def num_steps(self) -> int:
        """K, the student's number of steps."""
        return len(self.scheduler.timesteps)

    def groups(self, update: int) -> range:
        """The numbers of the groups that this process serves in an update; no two updates or processes share one."""
        first = (update * self.num_processes + self.process_index) * self.groups_per_update
        return range(first, first + self.groups_per_update)


@dataclass(frozen=True)
class Batch:
    """One update's samples, with the key of each group-and-step under which its random numbers are drawn."""

    samples: Samples
    keys: list[int]
    prompts: list[str]

    def named(self, index: int) -> str:
        """The prompt and step of a sample, for messages."""
        group_size = len(self.samples) // len(self.prompts)
        return f"prompt {self.prompts[index // group_size]!r}, student step {int(self.samples.step[index]) + 1}"


def collect(run: Distillation, update: int) -> Batch:
    """Rolls the student out for an update's groups and picks the states to train on. No gradients."""
    groups = run.groups(update)
    steps = [run.draws.subset("executed_steps", g, run.steps_per_rollout, run.num_steps) for g in groups]
    depth = max(chosen[-1] for chosen in steps) + 1
    noise = [run.draws.normal(f"rollout_noise/{k}", groups, run.latent_shape) for k in range(depth)]
    noise.append(torch.zeros_like(noise[0]))  # of the transition out of the last step, which nobody reads
    conditioning = run.prompts.conditioning(groups)
    trajectory = rollout(
        lambda x_t, t, c: run.networks.predict(STUDENT, x_t, t, c),
        run.scheduler, noise, conditioning, depth, run.micro_batch_size,
    )  # fmt: skip
    keys = [g * run.num_steps + k for g, chosen in zip(groups, steps, strict=True) for k in chosen]
    prompts = [run.prompts.prompt(g) for g, chosen in zip(groups, steps, strict=True) for _ in chosen]
    return Batch(executed_samples(trajectory, steps, run.draws.group_size, conditioning), keys, prompts)


def student_update(run: Distillation, batch: Batch) -> dict[str, Tensor]:
    """Accumulates the student's gradients: R_dm for all samples first, then one backward per micro-batch.

    Returns:
        The health numbers, scalars.

    Raises:
        NonFiniteError: if the direction is not finite; no gradient has been touched then.
    """
    samples = batch.samples
    tau = renoising_times(run.draws.uniform("tau", batch.keys), run.networks.schedule)
    noise = run.draws.normal("tau_noise", batch.keys, run.latent_shape)
    estimate = estimate_reward(run.networks, samples, tau, noise, run.micro_batch_size)
    direction = run.objective.direction(estimate)
    _require_finite("student direction", direction, batch)
    for part in samples.micro_batches(run.micro_batch_size):
        chunk = samples[part]
        x0 = run.networks.predict(STUDENT, chunk.x_t, chunk.t, chunk.conditioning)
        run.networks.backward(STUDENT, x0, direction[part])
    return _health(run.objective, estimate)


def fake_score_update(run: Distillation, batch: Batch, repeat: int) -> dict[str, Tensor]:
    """Accumulates the fake score's gradients: its denoising loss on the same samples, at fresh times and noises.

    Args:
        repeat: which of the update's fake-score updates this is.

    Raises:
        NonFiniteError: if the loss is not finite.
    """
    samples, schedule = batch.samples, run.networks.schedule
    uniform = run.draws.uniform(f"fake_time/{repeat}", batch.keys)
    t = _training_times(uniform, schedule)
    noise = run.draws.normal(f"fake_noise/{repeat}", batch.keys, run.latent_shape)
    x_t = schedule.add_noise(samples.x0, noise, t)
    weight = output_weight(run.networks.prediction_type, schedule.alpha(t), schedule.sigma(t))
    losses = []
    for part in samples.micro_batches(run.micro_batch_size):
        x0 = run.networks.predict(FAKE_SCORE, x_t[part], t[part], samples.conditioning[part])
        direction, loss = fake_score_direction(x0, samples.x0[part], weight[part], len(samples))
        _require_finite("fake score loss", loss, batch, part.start)
        run.networks.backward(FAKE_SCORE, x0, direction)
        losses.append(loss)
    return {"fake_loss": torch.cat(losses).mean()}


def _training_times(uniform: Tensor, schedule) -> Tensor:
    """Uniform over all training timesteps; for flow, never quite 0, where the output is undefined."""
    t = uniform * schedule.num_train_timesteps
    return t.clamp(min=1e-3 * schedule.num_train_timesteps) if schedule.is_flow else t.long()


def _health(objective: GNDM, estimate: RewardEstimate) -> dict[str, Tensor]:
    reward = estimate.reward.abs().mean()
    return {
        "reward_over_distance": reward / estimate.distance.mean(),
        "correction_over_reward": (objective.corrected_reward(estimate) - estimate.reward).abs().mean() / reward,
        "log_ratio": estimate.log_ratio.mean(),
        "distance": estimate.distance.mean(),
    }


def _require_finite(term: str, values: Tensor, batch: Batch, offset: int = 0) -> None:
    if values.isfinite().all():
        return
    first = int((~values.isfinite().flatten(1).all(1) if values.ndim > 1 else ~values.isfinite()).nonzero()[0, 0])
    raise NonFiniteError(
        f"The {term} is not finite for {batch.named(offset + first)}; nothing was saved over the last checkpoint. "
        "Resume from it with a lower learning rate."
    )
