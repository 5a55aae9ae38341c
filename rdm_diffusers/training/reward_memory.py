"""The memory that external rewards and their decoder need, measured on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..config import RunConfig
from ..distillation import Decode, differentiable_gradients, reward_values
from ..families import Family
from ..rewards import NamedReward, Reward, evaluate, reward_networks
from ..tiny.domains import domain_of
from .external_rewards import decoding_pipeline
from .memory_model import LivePeak, fused_attention, nbytes


@dataclass(frozen=True)
class RewardMemory:
    """Bytes that a run's rewards need; all 0 without rewards."""

    weights: int = 0  # of the rewards' networks
    vae: int = 0  # of an autoencoder of their own
    pictures: int = 0  # how many are decoded and scored at once
    peak: int = 0  # the most beside all weights while they are
    not_counted: tuple[str, ...] = ()  # what is not known of them, in words


def measure_rewards(
    config: RunConfig,
    rewards: Sequence[Reward] | None,
    family: Family,
    pipeline: DiffusionPipeline,
    latents: tuple[int, int, int],
) -> RewardMemory:
    """What a run's rewards need, in the very functions that the run calls.

    Args:
        config: the run's.
        rewards: the run's, which are not changed; None if they are not loaded: the decoder alone is counted then.
        family: the teacher's.
        pipeline: the teacher's, on the meta device.
        latents: (C, H, W) of a picture.
    """
    if not config.rewards.reward:
        return RewardMemory()
    pipeline = decoding_pipeline(family, pipeline, config)
    nn.Module.to(pipeline.vae, "meta")
    decode: Decode = partial(family.decode, pipeline)
    count = min(config.memory.decode_batch_size, config.optimisation.samples_per_update)
    x0, prompts = torch.empty(count, *latents, device="meta"), [_caption(config)] * count
    known, not_counted = rewards, [f"the reward {name}" for name in config.rewards.reward]
    if known is None:
        known = [_uncounted(name, differentiable=True) for name in config.rewards.reward]
    else:
        known, not_counted = _countable(known, decode(x0[:1]), prompts[:1])
    exact = [reward for reward in known if reward.differentiable]
    boxes = [reward for reward in known if not reward.differentiable]
    with fused_attention(), _masks(), LivePeak(pipeline.vae, *reward_networks(known)) as live:
        differentiable_gradients(exact, decode, x0, prompts, count)
        if boxes:
            reward_values(boxes, decode, x0, prompts, count)
    own = nbytes(pipeline.vae) if config.rewards.reward_vae else 0
    return RewardMemory(nbytes(*reward_networks(rewards or [])), own, count, live.peak, tuple(not_counted))


def _caption(config: RunConfig) -> str:
    """A prompt that every reward can judge."""
    return domain_of(config.teacher.pretrained_model_name_or_path).captions[0]


def _countable(rewards: Sequence[Reward], image: Tensor, prompt: Sequence[str]) -> tuple[list[Reward], list[str]]:
    """Each reward on the meta device, or what stands for it, and the latter in words. A user's own is never called."""
    countable: list[Reward] = []
    not_counted = []
    for reward in rewards:
        on_meta = None if isinstance(reward, NamedReward) else _on_meta(reward)
        if on_meta is not None and _works(on_meta, image, prompt):
            countable.append(on_meta)
        else:
            countable.append(_uncounted(reward.name, reward.differentiable))
            part = "the activations of the reward" if reward_networks([reward]) else "the reward"
            not_counted.append(f"{part} {reward.name}")
    return countable, not_counted


def _on_meta(reward: Reward) -> Reward:
    """A copy without numbers."""
    memo: dict[int, object] = {}
    for network in reward_networks([reward]):
        for tensor in [*network.parameters(), *network.buffers()]:
            empty = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(reward, memo)


def _works(reward: Reward, image: Tensor, prompt: Sequence[str]) -> bool:
    """Whether a reward can be called on the meta device; not if it reads numbers."""
    try:
        with _masks():
            evaluate(reward, image, prompt)
    except ValueError:
        return False
    return True


def _masks() -> TorchDispatchMode:
    return _Masks()  # type: ignore[no-untyped-call]


class _Masks(TorchDispatchMode):
    """Answers no on the meta device where a text model asks whether a prompt fills all places of its mask."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return False
        return func(*args, **(kwargs or {}))


def _uncounted(name: str, differentiable: bool) -> NamedReward:
    """A reward that needs next to no memory, but has the images decoded, and the gradients if it has some."""
    return NamedReward(lambda images, prompts: images.mean((1, 2, 3)), name, differentiable)
