"""External rewards as directions for x̂: exact gradients through the decoder, or estimates from numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prediction import expand
from ..rewards import Reward, evaluate
from .advantages import grouped

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
        micro_batch_size: how many samples are decoded at once.
    """
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in rewards]
    for start in range(0, len(x0), micro_batch_size):
        latents = x0[start : start + micro_batch_size].detach().requires_grad_()
        with torch.enable_grad():
            images = decode(latents)
            values = [evaluate(reward, images, prompts[start : start + len(latents)]) for reward in rewards]
        for part, value in zip(parts, values, strict=True):
            part.append((value.detach(), torch.autograd.grad(value.sum(), latents, retain_graph=True)[0]))
    return [RewardGradient.of(*(torch.cat(column) for column in zip(*part, strict=True))) for part in parts]


@torch.no_grad()
def perturbation_gradients(
    rewards: Sequence[Reward],
    decode: Decode,
    x0: Tensor,
    prompts: Sequence[str],
    micro_batch_size: int,
    noise: Sequence[Tensor],
    scale: float,
) -> list[RewardGradient]:
    """Each reward's estimated gradient, from its numbers at x̂ + scale e and x̂ - scale e (evolution strategies,
    arXiv 1703.03864): the mean over pairs of (r+ - r-) / (2 scale) e. The pair is its own baseline.

    Args:
        rewards, decode, x0, prompts, micro_batch_size: as above; nothing needs to be differentiable.
        noise: standard normal perturbations, each `[M, C, H, W]`, one per pair.
        scale: their size, in units of the latents.
    """
    totals = [(torch.zeros(len(x0), device=x0.device), torch.zeros_like(x0)) for _ in rewards]
    for e in noise:
        ahead, behind = (
            reward_values(rewards, decode, x0 + sign * scale * e, prompts, micro_batch_size) for sign in (1, -1)
        )
        totals = [
            (value + (plus + minus) / 2, gradient + expand((plus - minus) / (2 * scale), e) * e)
            for (value, gradient), plus, minus in zip(totals, ahead, behind, strict=True)
        ]
    return [RewardGradient.of(value / len(noise), gradient / len(noise)) for value, gradient in totals]


@torch.no_grad()
def group_gradients(
    rewards: Sequence[Reward],
    decode: Decode,
    x0: Tensor,
    prompts: Sequence[str],
    micro_batch_size: int,
    group_size: int,
) -> list[RewardGradient]:
    """Each reward's direction from the group alone: the mean over its members of A_j (x̂_j - group mean).

    A_j is the reward minus the mean of the group's valid ones. By Stein's lemma this is the group's covariance times
    the mean gradient of the smoothed reward; it costs one evaluation a sample, and stays where the student's samples
    lie. Groups of 1, and groups whose rewards are all equal, give 0.
    """
    gradients = []
    for values in reward_values(rewards, decode, x0, prompts, micro_batch_size):
        finite = grouped(values.isfinite(), group_size)
        numbers = torch.where(finite, grouped(values, group_size), 0)
        count = finite.sum(1, keepdim=True).clamp(min=1)
        advantage = torch.where(finite, numbers - numbers.sum(1, keepdim=True) / count, 0)
        members = grouped(x0, group_size)
        offsets = members - members.mean(1, keepdim=True)
        mean = (expand(advantage.flatten(), x0) * offsets.flatten(0, 1)).unflatten(0, members.shape[:2]).mean(1)
        gradients.append(RewardGradient.of(values, mean.repeat_interleave(group_size, 0)))
    return gradients


@torch.no_grad()
def reward_values(
    rewards: Sequence[Reward], decode: Decode, x0: Tensor, prompts: Sequence[str], micro_batch_size: int
) -> list[Tensor]:
    """Each reward of every sample, `[M]`; arguments as above. No gradients."""
    parts = []
    for start in range(0, len(x0), micro_batch_size):
        images = decode(x0[start : start + micro_batch_size])
        parts.append([evaluate(reward, images, prompts[start : start + len(images)]) for reward in rewards])
    return [torch.cat(column) for column in zip(*parts, strict=True)]
