"""The interface of a reward, and `evaluate`, which calls one and checks its result."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Reward(Protocol):
    """Scores pictures; higher is better, on any scale.

    Attributes:
        name: its name in logs and errors.
        differentiable: True if gradients flow from the result to the images; False for a black box.
    """

    @property
    def name(self) -> str: ...

    @property
    def differentiable(self) -> bool: ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images `[B, 3, H, W]`, float in [0, 1], and their B prompts -> one number each, `[B]`."""
        ...


class RewardError(ValueError):
    """A reward raised an error; the message names the reward and the place."""


@dataclass(frozen=True)
class WeightedReward:
    """A reward and its weight among the others: finite, not 0; a negative one punishes what the reward likes."""

    reward: Reward
    weight: float


def reward_networks(rewards: Iterable[Reward]) -> list[nn.Module]:
    """The networks that rewards are; what a user's function calls is not known."""
    callables = [getattr(reward, "function", reward) for reward in rewards]
    modules = [each for each in callables if isinstance(each, nn.Module)]
    return [each for each in modules if [*each.parameters(), *each.buffers()]]


def evaluate(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Calls a reward and checks its result.

    Args:
        reward: any reward; its result may also be an array or a list of numbers.
        images: `[B, 3, H, W]`, float in [0, 1].
        prompts: B strings.

    Returns:
        `[B]`, float32, on the images' device. Gradients flow to the images from a differentiable reward; a black box
        runs without gradients on a copy of the images. NaN and infinite values stay.

    Raises:
        ValueError: if there are not B prompts, if the result is not B numbers, or if a differentiable reward lost the
            gradients to images that require them.
        RewardError: if the reward itself raised.
    """
    if len(prompts) != len(images):
        raise ValueError(
            f"The reward {reward.name} got {len(prompts)} prompts for {len(images)} images; give one each."
        )
    if not reward.differentiable:
        with torch.no_grad():
            return _scores(reward, images.detach().clone(), prompts)
    scores = _scores(reward, images, prompts)
    if images.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
        raise ValueError(
            f"The reward {reward.name} calls itself differentiable, but no gradient leads from its result to the "
            "images; remove no_grad, detach, numpy or item() from it, or set differentiable = False."
        )
    return scores


def _scores(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward's answer as float32 `[B]` on the images' device, with its graph."""
    answer, count, device = _answer(reward, images, prompts), len(images), images.device
    as_float = partial(torch.as_tensor, dtype=torch.float32, device=device)
    try:
        is_list = isinstance(answer, list | tuple) and len(answer) > 0
        scores = torch.stack([as_float(number) for number in answer]) if is_list else as_float(answer)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The reward {reward.name} returned a {type(answer).__name__} that is no tensor of numbers; return a "
            "tensor [B] or a list of B numbers."
        ) from error
    if scores.shape != (count,):
        raise ValueError(
            f"The reward {reward.name} returned shape {list(scores.shape)} for {count} images; return one number per "
            f"image, [{count}]."
        )
    return scores


def _answer(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Any:
    try:
        return reward(images, prompts)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also sys.exit, which would end the run as if it had finished
        *_, place = traceback.extract_tb(error.__traceback__)
        raise RewardError(
            f"The reward {reward.name} raised {type(error).__name__} at {place.filename}:{place.lineno} ({error}); "
            "fix it. A training run that it ended resumes from its last checkpoint."
        ) from error
