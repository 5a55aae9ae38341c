"""The mean of the images that a noisy one may come from: a denoiser's regression target with less variance."""

from __future__ import annotations

import torch
from torch import Tensor


def posterior_mean(x_t: Tensor, alpha: Tensor, sigma: Tensor, images: Tensor, present: Tensor) -> Tensor:
    """E[x0 | x_t] where x0 is one of a few images, each as likely as the others, and `x_t = alpha x0 + sigma eps`.

    A network that regresses on it instead of on x0 has the same gradient on average, with less variance: at high noise
    much less. After the stable target field (Xu et al., arXiv 2302.00670), without its bias, because the
    images are all that x0 was chosen from.

    Args:
        x_t: noisy samples `[B, ...]`.
        alpha, sigma: `[B]`, sigma above 0.
        images: the images that each may come from `[B, M, ...]`.
        present: which of them there are `[B, M]`, one of each row at least.

    Returns:
        `[B, ...]`; no gradients flow.
    """
    candidates = images.flatten(2)
    apart = x_t.flatten(1)[:, None] - alpha[:, None, None] * candidates
    likelihood = -apart.square().sum(2) / (2 * sigma[:, None].square())
    weights = likelihood.masked_fill(~present, -torch.inf).softmax(1)
    return torch.einsum("bm,bmd->bd", weights, candidates).view_as(x_t)
