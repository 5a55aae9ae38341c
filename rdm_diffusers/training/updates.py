"""The two updates of one training step, on the samples of one rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distillation import (
    LCM,
    RunningMeans,
    ascent,
    estimate_reward,
    fake_score_direction,
    guidance_scales,
    guidance_times,
    importance_health,
    importance_weights,
)
from ..networks import FAKE_SCORE, STUDENT
from ..prediction import denoising_weight, expand
from .batches import Batch
from .discriminating import discriminator_health, judge_pictures, judge_samples
from .monitor import batch_health, consistency_health, contrast, fake_loss_health
from .run import Distillation


def _ascent(run: Distillation, batch: Batch, statistics: RunningMeans) -> tuple[Tensor, dict[str, Tensor]]:
    """Where the objective moves each x̂ `[M, C, H, W]`, and health numbers. Updates `statistics`."""
    samples, copies = batch.samples, run.num_renoisings
    if isinstance(run.objective, LCM):
        assert batch.target is not None
        losses = run.objective.losses(samples.x0, batch.target)
        return run.objective.pull(samples.x0, batch.target), consistency_health(losses, samples)
    draws = [batch.visit * copies + copy for copy in range(copies)]
    schedule = run.networks.schedule
    uniform, noise = _draw(run, batch, "tau", draws)
    all_samples = samples.repeat(copies)
    tau = run.renoising.times(uniform, all_samples, run.renoising_distribution)
    guidance = guidance_scale = None
    if run.decoupled_guidance:
        uniform, guidance_noise = _draw(run, batch, "guidance", draws)
        guidance = guidance_times(uniform, all_samples.t, schedule), guidance_noise
    if run.guidance_range:
        guidance_scale = guidance_scales(_uniform(run, batch, "guidance_scale", draws), *run.guidance_range)
    estimate = estimate_reward(
        run.networks, all_samples, tau, noise, run.micro_batch_size, guidance, run.renoising, guidance_scale
    )
    advantage = run.objective.advantage(estimate, statistics)
    move = ascent(run.networks, all_samples, estimate, advantage.pull, run.micro_batch_size)
    run.checks.note("R_dm", move, batch.name_of)
    move = move.unflatten(0, (copies, len(samples))).mean(0)
    return move, batch_health(estimate, advantage, run.draws.group_size)


def student_update(run: Distillation, batch: Batch, statistics: RunningMeans) -> dict[str, Tensor]:
    """Accumulates the student's gradients: a direction for all samples first, then one backward per micro-batch.

    The method's running means (`statistics`) are updated. Returns the health numbers, scalars. What must be finite is
    noted in `run.checks`, which the optimiser's step requires.
    """
    samples = batch.samples
    move, health = _ascent(run, batch, statistics)
    health["contrast"] = contrast(samples, run.num_steps)
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
    noises = [run.draws.normal(f"{purpose}_noise/{n}", batch.keys, run.latent_shape) for n in numbers]
    return _uniform(run, batch, purpose, numbers), torch.cat(noises)


def _uniform(run: Distillation, batch: Batch, purpose: str, numbers: list[int]) -> Tensor:
    """The uniform numbers of `_draw` alone."""
    return torch.cat([run.draws.uniform(f"{purpose}/{n}", batch.keys) for n in numbers])


def fake_score_update(run: Distillation, batch: Batch, repeat: int) -> dict[str, Tensor]:
    """Accumulates the fake score's gradients: its denoising loss on the same samples, at fresh times and noises.

    Those of its discriminator, if it has one, are among them. `repeat` says which of the rollout's fake-score updates
    this is. That the losses must be finite is noted in `run.checks`, which the optimiser's step requires.
    """
    samples, schedule = batch.samples, run.networks.schedule
    uniform = run.draws.uniform(f"fake_time/{repeat}", batch.keys)
    t = run.renoising.learning_times(uniform, samples, run.fake_distribution)
    renoised = run.renoising.renoise(samples, t, run.draws.normal(f"fake_noise/{repeat}", batch.keys, run.latent_shape))
    x_t, weight, own = renoised.x_tau, denoising_weight(schedule.sigma(t)), renoised.with_weight(samples.weight)
    if own is not None:
        weight = weight * own
    losses, verdicts = [], []
    for part in samples.micro_batches(run.micro_batch_size):
        chunk, more = samples[part], []
        x0, logit = run.networks.fake_score(x_t[part], t[part], chunk.conditioning, chunk.step)
        if logit is not None:
            move, verdict = judge_samples(run, batch, logit, part)
            more.append(move)
            verdicts.append(verdict)
        direction, loss = fake_score_direction(x0, chunk.x0, weight[part], len(samples))
        run.backward(FAKE_SCORE, x0, direction, part, len(samples), *more)
        losses.append(loss)
    run.checks.note("fake score loss", torch.cat(losses), batch.name_of)
    health = fake_loss_health(torch.cat(losses), t / schedule.num_train_timesteps)
    if verdicts:
        health |= discriminator_health(verdicts, judge_pictures(run, batch, t, repeat))
    return health
