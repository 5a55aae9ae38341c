"""The adversarial branch of DMD2 (arXiv 2405.14867): a discriminator on the fake score's features at x_tau.

It learns to tell noised pictures from the student's noised samples, D = sigmoid(logit):

    discriminator:  guidance_cls_loss_weight * (mean softplus(logit of samples) + mean softplus(-logit of pictures))
    student:        gen_cls_loss_weight * mean softplus(-logit of samples)

so that its logit tends to log p(x_tau) - log q(x_tau), p the pictures' density and q the samples'.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .statistics import RunningMeans

LIMIT = 5.0  # of the log ratio, so that no single sample dominates an update
TIME_BINS, RATIO_DECAY = 4, 0.95


def student_pull(logit: Tensor, weight: float, elements: int) -> Tensor:
    """Minus the gradient of the student's loss with respect to its samples' logits `[M]`, detached.

    R_dm's loss is a mean over elements and this one over samples; so beside R / n it counts `elements` times, which are
    those of one sample.
    """
    return weight * elements * torch.sigmoid(-logit.detach())


def discriminator_direction(
    logit: Tensor, weight: float, batch: int, pictures: bool = False, sample_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradient and the value of the discriminator's loss on samples, or on pictures.

    Args:
        logit: `[B]`.
        weight: `guidance_cls_loss_weight`.
        batch: how many of its kind the loss is a mean over, of which these are some.
        pictures: whether they are pictures.
        sample_weight: of each `[B]`, if any; the fake score's.

    Returns:
        The gradient with respect to `logit`, detached, and the loss of each `[B]`, without `weight`.
    """
    signed = -logit.detach() if pictures else logit.detach()
    slope, loss = torch.sigmoid(signed), F.softplus(signed)
    if sample_weight is not None:
        slope, loss = sample_weight * slope, sample_weight * loss
    return (-slope if pictures else slope) * weight / batch, loss


def density_ratio(logit: Tensor, tau: Tensor, statistics: RunningMeans) -> Tensor:
    """r = p(x_tau) / q(x_tau) at the student's samples `[M]`, whose mean over the samples is 1 at any noise level.

    e^logit over its running mean in the bin of its noise level, as E_q[p / q] = 1 (f-distill, arXiv 2502.15681).

    Args:
        logit: `[M]`.
        tau: shares of the timesteps `[M]`, in [0, 1).
        statistics: the running means; updated.
    """
    ratio = logit.clamp(-LIMIT, LIMIT).exp()
    bins = (tau * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    members = F.one_hot(bins, TIME_BINS).to(ratio.dtype)
    means = statistics.update("density_ratio", (members * ratio[:, None]).sum(0), members.sum(0), RATIO_DECAY)
    return ratio / means[bins]
