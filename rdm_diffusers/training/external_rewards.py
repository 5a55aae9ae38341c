"""External rewards in a run: asks them, turns their answers into directions, and joins these with R_dm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..config import RunConfig
from ..distillation import (
    GNDMR,
    Draws,
    RewardGradient,
    RunningMeans,
    Samples,
    differentiable_gradients,
    group_gradients,
    perturbation_gradients,
    reward_values,
    standardised_advantage,
    tilted_weight,
)
from ..distillation.advantages import grouped
from ..distillation.reward_gradients import Decode
from ..families import Teacher
from ..rewards import Reward, WeightedReward, load_reward

BLACK_BOX_FORMS = ("tilt", "group", "perturbation")


@dataclass(frozen=True)
class ExternalRewards:
    """The rewards of a run.

    Args:
        rewards: each with a name of its own.
        combination: how they join R_dm.
        decode: latents -> images in [0, 1], differentiable.
        draws: the run's randomness.
        micro_batch_size: pictures decoded and judged at once.
        black_box: how rewards without gradients act, one of `BLACK_BOX_FORMS`: by a tilt of the target, or by a
            direction from the group or from perturbations.
        tilt: kappa, by how many standard deviations within a prompt the rewards are to rise, about, for `tilt`.
        num_perturbations: pairs of perturbed copies per sample, for `perturbation`.
        perturbation_scale: their size in units of the latents.
    """

    rewards: Sequence[Reward]
    combination: GNDMR
    decode: Decode
    draws: Draws
    micro_batch_size: int
    black_box: str = "tilt"
    tilt: float = 0.25
    num_perturbations: int = 4
    perturbation_scale: float = 0.1

    @property
    def _boxes(self) -> list[Reward]:
        return [reward for reward in self.rewards if not reward.differentiable]

    def tilted(
        self, samples: Samples, prompts: Sequence[str], statistics: RunningMeans
    ) -> tuple[Samples, dict[str, Tensor]]:
        """The samples with the weights that black boxes give them, and the health numbers; unchanged in other forms.

        Args:
            samples: M samples; their x̂ is judged.
            prompts: length M.
            statistics: the method's running means; updated.
        """
        boxes = self._boxes
        if not boxes or self.black_box != "tilt":
            return samples, {}
        tilt = samples.x0.new_zeros(len(samples))
        health: dict[str, Tensor] = {}
        judged = reward_values(boxes, self.decode, samples.x0, prompts, self.micro_batch_size)
        for reward, values in zip(boxes, judged, strict=True):
            advantage = standardised_advantage(reward.name, values, self.draws.group_size, statistics)
            tilt += self.tilt * self.combination.proportion(reward.name) * advantage
            health |= self._health_of_values(reward.name, values, values.isfinite(), samples.step)
        return replace(samples, weight=tilted_weight(tilt, statistics)), health

    def join(
        self,
        ascent: Tensor,
        samples: Samples,
        prompts: Sequence[str],
        keys: Sequence[int],
        statistics: RunningMeans,
        visit: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """R_dm's direction with the rewards' part added, and the health numbers.

        Args:
            ascent: d `[M, C, H, W]`.
            samples: M samples; their x̂ is judged.
            prompts: length M.
            keys: one per group and step, for the perturbations' noise.
            statistics: the method's running means; updated.
            visit: how many updates the rollout has served, so that each has perturbations of its own.
        """
        gradients = self._gradients(samples.x0, prompts, keys, visit)
        joined = self.combination.combine(ascent, gradients, statistics)
        return joined, self._health(ascent, joined, gradients, samples.step)

    def _gradients(
        self, x0: Tensor, prompts: Sequence[str], keys: Sequence[int], visit: int = 0
    ) -> dict[str, RewardGradient]:
        exact = [reward for reward in self.rewards if reward.differentiable]
        boxes = [] if self.black_box == "tilt" else self._boxes
        found = differentiable_gradients(exact, self.decode, x0, prompts, self.micro_batch_size) if exact else []
        common = (boxes, self.decode, x0, prompts, self.micro_batch_size)
        if boxes and self.black_box == "perturbation":
            numbers = range(visit * self.num_perturbations, (visit + 1) * self.num_perturbations)
            noise = [self.draws.normal(f"perturbation/{n}", keys, x0.shape[1:]) for n in numbers]
            found += perturbation_gradients(*common, noise, self.perturbation_scale)
        elif boxes:
            found += group_gradients(*common, self.draws.group_size)
        return {reward.name: gradient for reward, gradient in zip(exact + boxes, found, strict=True)}

    def _health(
        self, ascent: Tensor, joined: Tensor, gradients: dict[str, RewardGradient], step: Tensor
    ) -> dict[str, Tensor]:
        health = {"reward_share_effective": (joined - ascent).square().mean().sqrt() / ascent.square().mean().sqrt()}
        for name, found in gradients.items():
            health |= self._health_of_values(name, found.values, found.valid, step)
            health[f"reward_cosine/{name}"] = torch.cosine_similarity(
                ascent.flatten(1), found.gradient.flatten(1), dim=1
            ).mean()
        return health

    def _health_of_values(self, name: str, values: Tensor, valid: Tensor, step: Tensor) -> dict[str, Tensor]:
        health = {f"reward/{name}": values[valid].mean(), f"reward_invalid/{name}": (~valid).float().mean()}
        groups = grouped(values, self.draws.group_size)
        spread = groups.std(1, correction=0)
        for k in step.unique().tolist():
            at_k = step[:: self.draws.group_size] == k
            health[f"reward/{name}/step_{k + 1}"] = groups[at_k].mean()
            health[f"reward_std/{name}/step_{k + 1}"] = spread[at_k].mean()
        return health


def load_rewards(config: RunConfig, device: torch.device) -> list[WeightedReward]:
    """The external rewards that the arguments name.

    Raises:
        ValueError: as `load_reward`, and if two have one name.
    """
    rewards = config.rewards
    loaded = [load_reward(spec, device, getattr(torch, rewards.reward_dtype)) for spec in rewards.reward]
    if len({weighted.reward.name for weighted in loaded}) < len(loaded):
        raise ValueError(f"Two of the rewards {', '.join(rewards.reward)} have one name; name each once.")
    boxes = [weighted.reward.name for weighted in loaded if not weighted.reward.differentiable]
    if boxes and config.method.group_size == 1:
        raise ValueError(
            f"The reward {boxes[0]} gives no gradients, and --reward_tilt compares the members of a "
            "group: raise --group_size above 1."
        )
    if loaded and rewards.reward_share > 0.5 and rewards.reward_combination == "share":
        print(
            f"warning: --reward_share {rewards.reward_share} lets the rewards outweigh fidelity; "
            "above 0.5 is not advised."
        )
    return loaded


def join_rewards(loaded: list[WeightedReward], teacher: Teacher, draws: Draws, config: RunConfig) -> ExternalRewards:
    """Rewards as a run asks them: through the teacher's decoder, and joined as the arguments say."""
    teacher.pipeline.vae.to(draws.device)
    weights = {weighted.reward.name: weighted.weight for weighted in loaded}
    if config.memory.gradient_checkpointing:
        teacher.pipeline.vae.enable_gradient_checkpointing()
    return ExternalRewards(
        rewards=[weighted.reward for weighted in loaded],
        combination=GNDMR(
            config.method.group_size,
            weights,
            config.rewards.reward_share,
            config.rewards.reward_combination,
            config.rewards.projection_guard,
        ),
        decode=partial(teacher.family.decode, teacher.pipeline),
        draws=draws,
        micro_batch_size=config.optimisation.train_batch_size,
        tilt=config.rewards.reward_tilt,
    )
