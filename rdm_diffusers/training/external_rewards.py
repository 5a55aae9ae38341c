"""External rewards in a run: scores samples, and joins the scores' gradients or weights with R_dm."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..config import RunConfig
from ..config.checks import check_rewards
from ..distillation import (
    GNDMR,
    MATCHINGS,
    Decode,
    RunningMeans,
    Samples,
    differentiable_gradients,
    grouped,
    reward_values,
    standardised_advantage,
    tilted_weight,
)
from ..distillation.advantages import rows
from ..families import Family, Teacher, load_tiny_vae, rebuilt
from ..rewards import Functions, Reward, WeightedReward, load_distinct_rewards, reward_networks, with_functions
from .devices import on_device
from .reward_schedule import reward_schedule


@dataclass(frozen=True, kw_only=True)
class ExternalRewards:
    """The rewards of a run. Those with gradients join R_dm's direction; those without tilt the target.

    Args:
        rewards: each with a name of its own.
        combination: how they join R_dm.
        decode: latents -> images in [0, 1], differentiable.
        micro_batch_size: pictures decoded and scored at once.
        offloaded_vae: the autoencoder, if it and the rewards' networks are to be on the samples' device only while they
            work; None leaves them where they are.
        reward_tilt: kappa, by about how many standard deviations within a prompt those without gradients are to rise.
        schedule: update, counted from 0 -> how much of their strength the rewards have there, in [0, 1].
    """

    rewards: Sequence[Reward]
    combination: GNDMR
    decode: Decode
    micro_batch_size: int
    offloaded_vae: nn.Module | None = None
    reward_tilt: float = 0.25
    schedule: Callable[[int], float] = lambda update: 1.0

    def tilt(
        self, samples: Samples, prompts: Sequence[str], statistics: RunningMeans, strength: float = 1.0
    ) -> tuple[Samples, dict[str, Tensor]]:
        """The samples with the weights that rewards without gradients give them, if there are any; health numbers.

        Args:
            samples: M samples, whose x̂ is scored.
            prompts: length M.
            statistics: the method's running means; updated.
            strength: kappa is multiplied by it.
        """
        boxes = [reward for reward in self.rewards if not reward.differentiable]
        if not boxes:
            return samples, {}
        tilt = samples.x0.new_zeros(len(samples))
        health: dict[str, Tensor] = {}
        with self._at_work(boxes, samples.x0.device):
            scores = reward_values(boxes, self.decode, samples.x0, prompts, self.micro_batch_size)
        for reward, values in zip(boxes, scores, strict=True):
            advantage = standardised_advantage(reward.name, values, self.combination.group_size, statistics)
            tilt += strength * self.reward_tilt * self.combination.proportion(reward.name) * advantage
            health |= self._health(reward.name, values, values.isfinite(), samples.step)
        return replace(samples, weight=tilted_weight(tilt, statistics)), health

    def join(
        self,
        ascent: Tensor,
        samples: Samples,
        prompts: Sequence[str],
        statistics: RunningMeans,
        strength: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """R_dm's direction with the part of the rewards that have gradients, and health numbers.

        Args:
            ascent: d `[M, C, H, W]`.
            samples: M samples, whose x̂ is scored.
            prompts: length M.
            statistics: the method's running means; updated.
            strength: the rewards' part is multiplied by it.
        """
        exact = [reward for reward in self.rewards if reward.differentiable]
        with self._at_work(exact, samples.x0.device):
            found = differentiable_gradients(exact, self.decode, samples.x0, prompts, self.micro_batch_size)
        gradients = {reward.name: gradient for reward, gradient in zip(exact, found, strict=True)}
        joined = self.combination.combine(ascent, gradients, statistics, strength)
        size = ascent.square().mean().sqrt()
        health = {"reward_share_effective": (joined - ascent).square().mean().sqrt() / size}
        for name, reward in gradients.items():
            health |= self._health(name, reward.values, reward.valid, samples.step)
            cosine = torch.cosine_similarity(ascent.flatten(1), reward.gradient.flatten(1), dim=1)
            health[f"reward_cosine/{name}"] = cosine.mean()
        return joined, health

    def _at_work(self, rewards: Sequence[Reward], device: torch.device) -> AbstractContextManager[None]:
        """Inside, the autoencoder and these rewards are on the device."""
        if self.offloaded_vae is None or not rewards:
            return nullcontext()
        return on_device([self.offloaded_vae, *reward_networks(rewards)], device)

    def _health(self, name: str, values: Tensor, valid: Tensor, step: Tensor) -> dict[str, Tensor]:
        health = {
            f"reward/{name}": values.where(valid, torch.nan).nanmean(),
            f"reward_invalid/{name}": (~valid).float().mean(),
        }
        group_size = self.combination.group_size
        groups = grouped(values, group_size)
        spread = groups.std(1, correction=0)
        for k in step.unique().tolist():
            at_k = step[::group_size] == k
            health[f"reward/{name}/step_{k + 1}"] = rows(groups, at_k).mean()
            health[f"reward_std/{name}/step_{k + 1}"] = rows(spread, at_k).mean()
        return health


def with_reward_funcs(config: RunConfig, functions: Functions, weights: Sequence[float] | None) -> RunConfig:
    """The configuration with the functions that Python gives; ValueError if they do not fit together."""
    config = config.changed("rewards", reward=with_functions(config.rewards.reward, functions, weights))
    check_rewards(config)
    return config


def load_rewards(
    config: RunConfig, device: torch.device, functions: Functions = MappingProxyType({})
) -> list[WeightedReward]:
    """The run's rewards, with `--offload` on the CPU; `functions` are those that Python gives.

    Raises ValueError as `load_distinct_rewards`, and for a black box without groups or without a fake score.
    """
    rewards, home = config.rewards, torch.device("cpu") if config.memory.offload else device
    dtype = getattr(torch, rewards.reward_dtype)
    loaded = list(load_distinct_rewards(rewards.reward, home, dtype, functions).values())
    boxes = [weighted.reward.name for weighted in loaded if not weighted.reward.differentiable]
    if boxes and config.method.algorithm not in MATCHINGS:
        raise ValueError(
            f"The reward {boxes[0]} gives no gradients and acts through the fake score alone, which --algorithm "
            f"{config.method.algorithm} has not; leave it out, or use --algorithm gndmr."
        )
    if boxes and config.method.group_size == 1:
        raise ValueError(
            f"The reward {boxes[0]} gives no gradients, so its scores are compared within groups: raise --group_size "
            "above 1."
        )
    if loaded and rewards.reward_share > 0.5 and rewards.reward_combination == "share":
        warnings.warn(
            f"--reward_share {rewards.reward_share} lets the rewards outweigh fidelity; above 0.5 is not advised.",
            stacklevel=2,
        )
    return loaded


def join_rewards(
    loaded: list[WeightedReward], teacher: Teacher, device: torch.device | str, config: RunConfig
) -> ExternalRewards:
    """The rewards behind their decoder, which moves to the device without `--offload`, joined as configured."""
    pipeline = decoding_pipeline(teacher.family, teacher.pipeline, config)
    if not config.memory.offload:
        pipeline.vae.to(device)
    combination = GNDMR(
        group_size=config.method.group_size,
        weights={weighted.reward.name: weighted.weight for weighted in loaded},
        reward_share=config.rewards.reward_share,
        reward_combination=config.rewards.reward_combination,
        projection_guard=config.rewards.projection_guard,
    )
    return ExternalRewards(
        rewards=[weighted.reward for weighted in loaded],
        combination=combination,
        decode=partial(teacher.family.decode, pipeline),
        micro_batch_size=config.memory.decode_batch_size,
        offloaded_vae=pipeline.vae if config.memory.offload else None,
        reward_tilt=config.rewards.reward_tilt,
        schedule=reward_schedule(config),
    )


def decoding_pipeline(family: Family, pipeline: DiffusionPipeline, config: RunConfig) -> DiffusionPipeline:
    """The pipeline whose autoencoder decodes for the rewards: the teacher's own, or one with `--reward_vae`.

    It is given gradient checkpointing if that is asked for and the autoencoder supports it.
    """
    if config.rewards.reward_vae:
        tiny = load_tiny_vae(config.rewards.reward_vae, pipeline.vae.dtype)
        pipeline = rebuilt(family.pipeline_class, pipeline, vae=tiny)
    if config.memory.gradient_checkpointing and pipeline.vae._supports_gradient_checkpointing:
        pipeline.vae.enable_gradient_checkpointing()
    return pipeline
