"""The discriminator's part of a fake score's update: it tells the student's samples from pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..distillation import discriminator_direction
from ..networks import FAKE_SCORE

if TYPE_CHECKING:
    from .batches import Batch
    from .run import Distillation

Verdict = tuple[Tensor, Tensor]  # logits [B] and the losses of each [B], detached


def judge_samples(run: Distillation, batch: Batch, logit: Tensor, part: slice) -> tuple[tuple[Tensor, Tensor], Verdict]:
    """What a part of the batch's samples teaches the discriminator, whose logits the fake score's forward has given.

    Returns:
        The logits with their direction, for `Distillation.backward`; and the verdict.
    """
    samples = batch.samples
    weight = None if samples.weight is None else samples.weight[part]
    direction, loss = discriminator_direction(logit, run.guidance_cls_loss_weight, len(samples), sample_weight=weight)
    return (logit, direction), (logit.detach(), loss)


def judge_pictures(run: Distillation, batch: Batch, t: Tensor, repeat: int) -> list[Verdict]:
    """Accumulates the discriminator's gradients on as many pictures as the batch has samples.

    They are noised to the samples' times `t [M]`, and read under the samples' student steps, so that nothing but what
    they show tells them apart. That the losses must be finite is noted in `run.checks`.
    """
    samples, networks = batch.samples, run.networks
    if run.pictures is None:
        raise ValueError("A discriminator needs pictures, and the run has none.")
    x0, conditioning = run.pictures.batch(f"picture/{repeat}", batch.keys)
    noise = run.draws.normal(f"picture_noise/{repeat}", batch.keys, run.latent_shape)
    x_t, verdicts = networks.schedule.add_noise(x0, noise, t), []
    for part in samples.micro_batches(run.micro_batch_size):
        _, logit = networks.fake_score(x_t[part], t[part], conditioning[part], samples.step[part])
        if logit is not None:
            direction, loss = discriminator_direction(logit, run.guidance_cls_loss_weight, len(samples), pictures=True)
            run.backward(FAKE_SCORE, logit, direction, part, len(samples))
            verdicts.append((logit.detach(), loss))
    run.checks.note("discriminator's loss on pictures", torch.cat([loss for _, loss in verdicts]), batch.name_of)
    return verdicts


def discriminator_health(samples: Sequence[Verdict], pictures: Sequence[Verdict]) -> dict[str, Tensor]:
    """What the discriminator takes samples and pictures for, on average, 1 being a picture; and its loss."""
    (logit, loss), (real, real_loss) = ((torch.cat(each) for each in zip(*v, strict=True)) for v in (samples, pictures))
    return {
        "discriminator/samples": logit.sigmoid().mean(),
        "discriminator/pictures": real.sigmoid().mean(),
        "discriminator/loss": loss.mean() + real_loss.mean(),
    }
