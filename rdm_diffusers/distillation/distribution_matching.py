"""R_dm: distribution matching as a reward on the student's prediction, estimated at a re-noised copy of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..networks import TEACHER, Networks
from .renoising import FreshNoise, Renoising
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
        logit: the discriminator's at x_tau `[M]`; None without one.
        ratio: the teacher's density over the student's at x_tau `[M]`, which `logit` gives (`adversarial.py`).
        reach: dx_tau/dx̂ over a `[M]`; None where it is 1.
        guidance_scale: the teacher's w for each sample `[M]`; None where all have the networks'.
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
    logit: Tensor | None = None
    ratio: Tensor | None = None
    reach: Tensor | None = None
    guidance_scale: Tensor | None = None

    @property
    def slope(self) -> Tensor:
        """dx_tau/dx̂ `[M]`."""
        return self.alpha if self.reach is None else self.alpha * self.reach

    @property
    def reward(self) -> Tensor:
        """R = teacher x0 - fake x0 `[M, C, H, W]`: the direction in which the teacher moves the sample (DMD2)."""
        return self.teacher_x0 - self.fake_x0

    @property
    def density_ratio(self) -> Tensor:
        """`ratio`, of an estimate that must have it. Raises ValueError if there is no discriminator."""
        if self.ratio is None:
            raise ValueError("The density ratio needs a discriminator on the fake score's features.")
        return self.ratio

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
    renoising: Renoising | None = None,
    guidance_scale: Tensor | None = None,
) -> RewardEstimate:
    """Evaluates the real score (the teacher, or its target) and the fake score at the re-noised x̂.

    No gradients.

    Args:
        networks: the roles.
        samples: M samples.
        tau: re-noising times `[M]`.
        noise: `[M, C, H, W]`.
        micro_batch_size: how many samples go through a network at once; all by default.
        guidance: times `[M]` and noises `[M, C, H, W]` of its own for what guidance adds to the teacher's x0
            (Decoupled DMD); by default it is estimated at tau, too. x̂ has fresh noise there.
        renoising: how x̂ is re-noised; `FreshNoise` by default.
        guidance_scale: the teacher's w for each sample `[M]`; the networks' by default.
    """
    renoised = (renoising or FreshNoise(networks.schedule)).renoise(samples, tau, noise)
    x_tau = renoised.x_tau
    real, fake, logits = [], [], list[Tensor]()
    for part in samples.micro_batches(micro_batch_size or len(samples)):
        chunk, scale = samples[part], None if guidance_scale is None else guidance_scale[part]
        inputs = x_tau[part], tau[part], chunk.conditioning, chunk.step
        if guidance is None:
            real.append(networks.predict(networks.real_score, *inputs, guidance_scale=scale))
        else:
            t, other_noise = (each[part] for each in guidance)
            other = networks.schedule.add_noise(chunk.x0, other_noise, t)
            added = networks.guidance(other, t, chunk.conditioning, scale)
            real.append(networks.predict(TEACHER, *inputs, guided=False) + added)
        x0, logit = networks.fake_score(*inputs)
        fake.append(x0)
        logits += [] if logit is None else [logit]
    teacher_x0, fake_x0 = torch.cat(real), torch.cat(fake)
    schedule, share = networks.schedule, tau / networks.schedule.num_train_timesteps
    return RewardEstimate(
        samples.x0, teacher_x0, fake_x0, schedule.alpha(tau), schedule.sigma(tau), share, samples.step,
        weight=renoised.with_weight(samples.weight), x_tau=x_tau, time=tau, reach=renoised.reach,
        guidance_scale=guidance_scale, logit=torch.cat(logits) if logits else None,
    )  # fmt: skip
