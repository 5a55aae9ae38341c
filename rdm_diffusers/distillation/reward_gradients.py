"""External rewards of x̂: exact gradients through the decoder, or values alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prediction import expand
from ..rewards import Reward, evaluate

FAR = 100  # exponents of two that float32 and its inverses reach
Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RewardGradient:
    """One reward's numbers and direction for M samples, detached.

    Args:
        values: the rewards `[M]`, NaN or infinite where they are invalid.
        gradient: where x̂ should go for a higher reward `[M, C, H, W]`, of any scale; 0 where invalid.
        valid: bool `[M]`.
    """

    values: Tensor
    gradient: Tensor
    valid: Tensor

    @staticmethod
    def of(values: Tensor, gradient: Tensor) -> RewardGradient:
        """Marks what is not finite, or has no finite square, as invalid, and clears its gradient."""
        valid = values.isfinite() & gradient.flatten(1).square().sum(1).isfinite()
        return RewardGradient(values, torch.where(expand(valid, gradient), gradient, 0), valid)


def differentiable_gradients(
    rewards: Sequence[Reward], decode: Decode, x0: Tensor, prompts: Sequence[str], micro_batch_size: int
) -> list[RewardGradient]:
    """Each reward's exact gradient with respect to x̂, through the decoder; one decoding serves all rewards.

    Args:
        rewards: differentiable ones.
        decode: latents `[B, C, H, W]` -> images `[B, 3, H', W']` in [0, 1], differentiable.
        x0: x̂ `[M, C, H, W]`; detached here.
        prompts: length M.
        micro_batch_size: how many samples are decoded at once. No graph outlives its micro-batch.
    """
    if not rewards:
        return []
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in rewards]
    for start in range(0, len(x0), micro_batch_size):
        batch = slice(start, start + micro_batch_size)
        for part, found in zip(parts, _gradients(rewards, decode, x0[batch], prompts[batch]), strict=True):
            part.append(found)
    return [RewardGradient.of(*(torch.cat(column) for column in zip(*part, strict=True))) for part in parts]


def _gradients(
    rewards: Sequence[Reward], decode: Decode, x0: Tensor, prompts: Sequence[str]
) -> list[tuple[Tensor, Tensor]]:
    """Each reward's values and gradient for one micro-batch.

    A reward's own graph is freed before its gradient goes through the decoder, whose graph stays while rewards follow.
    """
    latents = x0.detach().requires_grad_()
    with torch.enable_grad():
        images = decode(latents)
    found = []
    for number, reward in enumerate(rewards, 1):
        shown = images.detach().requires_grad_()
        with torch.enable_grad():
            values = evaluate(reward, shown.clone(), prompts)  # a copy, which a reward may change in place
        (uphill,) = torch.autograd.grad(values.sum(), shown)
        size = power_of_two(uphill)
        (gradient,) = torch.autograd.grad(images, latents, uphill / size, retain_graph=number < len(rewards))
        found.append((values.detach(), gradient * size))
    return found


def power_of_two(gradient: Tensor) -> Tensor:
    """A power of two for each sample `[B, 1, ...]`, up to twice the largest of its `gradient [B, ...]`.

    Divided by it, a gradient is not rounded, and a decoder in float16 does not turn it into 0.
    """
    largest = gradient.abs().flatten(1).amax(1).view(-1, *[1] * (gradient.ndim - 1))
    exponent = torch.frexp(largest).exponent.clamp(-FAR, FAR)
    return torch.ldexp(torch.ones_like(largest), exponent)


@torch.no_grad()
def reward_values(
    rewards: Sequence[Reward], decode: Decode, x0: Tensor, prompts: Sequence[str], micro_batch_size: int
) -> list[Tensor]:
    """Each reward of every sample, `[M]`, without gradients; arguments as in `differentiable_gradients`."""
    parts = []
    for start in range(0, len(x0), micro_batch_size):
        images = decode(x0[start : start + micro_batch_size])
        parts.append([evaluate(reward, images, prompts[start : start + len(images)]) for reward in rewards])
    return [torch.cat(column) for column in zip(*parts, strict=True)]
