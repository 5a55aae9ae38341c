"""R_dm: distribution matching as a reward on the student's prediction, estimated at a re-noised copy of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..networks import FAKE_SCORE, TEACHER, Networks
from .rollout import Samples


@dataclass(frozen=True)
class RewardEstimate:
    """R_dm for M samples; everything float32 and detached.

    Args:
        x0: the student's predictions x̂ `[M, C, H, W]`.
        teacher_x0: the guided teacher's x0 at the re-noised x̂, same shape.
        fake_x0: the fake score's, same shape.
        alpha, sigma: the scales a, s of each sample's tau `[M]`.
        tau: the re-noising times as shares of the training timesteps `[M]`, in [0, 1).
        step: which of the student's steps each sample is `[M]`.
        weight: the samples' weights for the fake score `[M]`, if any.
        x_tau: the re-noised x̂ `[M, C, H, W]`.
        time: its times in the units of the timesteps `[M]`.
    """

    x0: Tensor
    teacher_x0: Tensor
    fake_x0: Tensor
    alpha: Tensor
    sigma: Tensor
    tau: Tensor
    step: Tensor
    weight: Tensor | None = None
    x_tau: Tensor | None = None
    time: Tensor | None = None

    @property
    def reward(self) -> Tensor:
        """R = teacher x0 - fake x0 `[M, C, H, W]`: the direction in which the teacher moves the sample (DMD2)."""
        return self.teacher_x0 - self.fake_x0

    @property
    def distance(self) -> Tensor:
        """n = mean |x̂ - teacher x0| of each sample `[M]`, DMD's normaliser."""
        return (self.x0 - self.teacher_x0).abs().flatten(1).mean(1)

    @property
    def log_ratio(self) -> Tensor:
        """|x̂ - fake x0|^2 - |x̂ - teacher x0|^2, mean over dimensions, `[M]`: R_dm as a scalar.

        Grows with log p_teacher - log p_student; for logging, our reading, not a training signal.
        """
        to_fake, to_teacher = (self.x0 - self.fake_x0) ** 2, (self.x0 - self.teacher_x0) ** 2
        return (to_fake - to_teacher).flatten(1).mean(1)


@torch.no_grad()
def estimate_reward(
    networks: Networks,
    samples: Samples,
    tau: Tensor,
    noise: Tensor,
    micro_batch_size: int | None = None,
    guidance: tuple[Tensor, Tensor] | None = None,
) -> RewardEstimate:
    """Evaluates the real score (the teacher, or its target) and the fake score at x_tau = alpha x̂ + sigma noise.

    No gradients.

    Args:
        networks: the roles.
        samples: M samples.
        tau: re-noising times `[M]`.
        noise: `[M, C, H, W]`.
        micro_batch_size: how many samples go through a network at once; all by default.
        guidance: times `[M]` and noises `[M, C, H, W]` of its own for what guidance adds to the teacher's x0
            (Decoupled DMD); by default it is estimated at tau, too.
    """
    x_tau = networks.schedule.add_noise(samples.x0, noise, tau)
    real, fake = [], []
    for part in samples.micro_batches(micro_batch_size or len(samples)):
        chunk, inputs = samples[part], (x_tau[part], tau[part])
        if guidance is None:
            real.append(networks.predict(networks.real_score, *inputs, chunk.conditioning, chunk.step))
        else:
            t, other_noise = (each[part] for each in guidance)
            added = networks.guidance(networks.schedule.add_noise(chunk.x0, other_noise, t), t, chunk.conditioning)
            real.append(networks.predict(TEACHER, *inputs, chunk.conditioning, guided=False) + added)
        fake.append(networks.predict(FAKE_SCORE, *inputs, chunk.conditioning, chunk.step))
    teacher_x0, fake_x0 = torch.cat(real), torch.cat(fake)
    schedule, share = networks.schedule, tau / networks.schedule.num_train_timesteps
    scales = schedule.alpha(tau), schedule.sigma(tau)
    return RewardEstimate(samples.x0, teacher_x0, fake_x0, *scales, share, samples.step, samples.weight, x_tau, tau)
