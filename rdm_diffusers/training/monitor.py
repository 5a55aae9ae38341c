"""A run's health numbers, and alarms that say in one sentence what is wrong and what to try."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..distillation import Advantage, RewardEstimate, Samples
from ..distillation.advantages import grouped, rows
from ..program import RunError

WARM_UP, SETTLED, DECAY = 10, 100, 0.99  # updates before alarms, and before lowest values count
FAKE_LOSS_BINS = 4
BIAS_SHARE, REWARD_SHARE, CONTRAST_DRIFT = 0.5, 0.5, 1.4


class CollapseError(RunError):
    """The run was stopped because an alarm rang (`--stop_on_collapse`)."""


@torch.no_grad()
def batch_health(estimate: RewardEstimate, advantage: Advantage, group_size: int) -> dict[str, Tensor]:
    """Scalars of one student update.

    `reward_over_distance`: mean |R| / mean n; `correction_over_reward`: |lambda b| / |R|; `log_ratio`: R_dm as a
    scalar; `distance`: n, mean |x̂ - teacher x0|;
    `bias_share/step_k`: the share of the fake score's squared residual that is bias, without the noise's part.
    """
    size = advantage.reward.abs().mean()
    health = {
        "reward_over_distance": size / estimate.distance.mean(),
        "correction_over_reward": advantage.correction.abs().mean() / size.clamp(min=1e-12),
        "log_ratio": estimate.log_ratio.mean(),
        "distance": estimate.distance.mean(),
    }
    return health | bias_shares(estimate, group_size)


def consistency_health(losses: Tensor, samples: Samples) -> dict[str, Tensor]:
    """The mean of the consistency losses `[M]`, also by the student's step from which each sample's noise is left."""
    steps = samples.step.unique().tolist()
    by_step = {f"consistency_loss/step_{k + 1}": rows(losses, samples.step == k).mean() for k in steps}
    return {"consistency_loss": losses.mean()} | by_step


def contrast(samples: Samples, num_steps: int) -> Tensor:
    """The standard deviation of the last step's x̂, a scalar; NaN where none of the samples is of that step."""
    last = samples.step == num_steps - 1
    return rows(samples.x0, last).std() if last.any() else samples.x0.new_full((), math.nan)


def bias_shares(estimate: RewardEstimate, group_size: int) -> dict[str, Tensor]:
    """For each student step, power of the group's shared residual over its whole power; unbiased, so it may be < 0."""
    if group_size == 1:
        return {}
    residual = grouped(estimate.fake_x0 - estimate.x0, group_size).flatten(2)
    power = residual.square().mean((1, 2))
    shared = (group_size * residual.mean(1).square().mean(1) - power) / (group_size - 1)
    step = estimate.step[::group_size]
    steps = step.unique().tolist()
    shares = {f"bias_share/step_{k + 1}": rows(shared, step == k).mean() / rows(power, step == k).mean() for k in steps}
    return {"bias_share": shared.mean() / power.mean()} | shares


def fake_loss_health(losses: Tensor, time: Tensor) -> dict[str, Tensor]:
    """The mean of the fake score's losses `[M]`, also by bins of the noising times `[M]`, which lie in [0, 1).

    An empty bin's mean is NaN.
    """
    bins = (time * FAKE_LOSS_BINS).long().clamp(max=FAKE_LOSS_BINS - 1)
    by_bin = {f"fake_loss/bin_{b + 1}": losses.where(bins == b, math.nan).nanmean() for b in range(FAKE_LOSS_BINS)}
    return {"fake_loss": losses.mean()} | by_bin


@dataclass
class Monitor:
    """Smooths a run's health numbers and rings alarms."""

    teacher_contrast: float | None = None  # the standard deviation of the teacher's own latents
    state: dict[str, float] = field(default_factory=dict)  # smoothed numbers, ringing alarms; belongs into checkpoints

    def observe(self, health: Mapping[str, float]) -> list[str]:
        """Takes in an update's numbers; one sentence for each alarm that begins to ring now."""
        updates = self.state["updates"] = self.state.get("updates", 0.0) + 1
        for name, value in health.items():
            self._smooth(name, value)
        if updates < WARM_UP:
            return []
        fresh = []
        for name, rings, text in self._alarms():
            if rings and not self.state.get(f"rings/{name}"):
                fresh.append(text)
            self.state[f"rings/{name}"] = float(rings)
        return fresh

    def _smooth(self, name: str, value: float) -> None:
        """Keeps a moving average, at first a plain mean, and its lowest and first settled values."""
        if not math.isfinite(value):
            return
        count = self.state[f"count/{name}"] = self.state.get(f"count/{name}", 0.0) + 1
        smooth = self.state.get(f"smooth/{name}", 0.0)
        smooth = self.state[f"smooth/{name}"] = smooth + max(1 - DECAY, 1 / count) * (value - smooth)
        if self.state["updates"] >= SETTLED:
            self.state[f"low/{name}"] = min(self.state.get(f"low/{name}", smooth), smooth)
            self.state.setdefault(f"first/{name}", smooth)

    def _now(self, name: str) -> float:
        return self.state.get(f"smooth/{name}", 0.0)

    def _rise(self, name: str) -> float:
        """How many times its lowest value a number is; 1 if unknown."""
        low = self.state.get(f"low/{name}", 0.0)
        return self._now(name) / low if low > 0 else 1.0

    def _alarms(self) -> Iterator[tuple[str, bool, str]]:
        """Every alarm: its name, whether it rings, and what it says."""
        bias = self._now("bias_share")
        text = (
            f"The fake score does not follow the student ({bias:.0%} of its squared error is bias): raise "
            "--fake_updates_per_step or --fake_learning_rate, or lower --learning_rate."
        )
        yield "fake_score_lags", bias > BIAS_SHARE, text
        reference = self.teacher_contrast or 0.0
        contrast = self._now("contrast") / reference if reference and "smooth/contrast" in self.state else 1.0
        text = (
            f"The student's contrast is {contrast:.2f} times the teacher's: lower --reward_share if rewards are on, "
            "else --guidance_scale or --learning_rate."
        )
        yield "contrast", not 1 / CONTRAST_DRIFT < contrast < CONTRAST_DRIFT, text
        share = self._now("reward_share_effective")
        text = (
            f"The rewards' part of a step is {share:.2f} times R_dm's, so fidelity will be lost: lower --reward_share "
            "(or the weights, with --reward_combination sum)."
        )
        yield "reward_share", share > REWARD_SHARE, text
        gap, loss = self._rise("distance"), self._rise("fake_loss")
        text = (
            f"The distance to the teacher is {gap:.1f} times its lowest so far: lower --learning_rate, and resume from "
            "an earlier checkpoint."
        )
        yield "fidelity", gap > 2, text
        text = (
            f"The fake score's loss is {loss:.1f} times its lowest so far: lower --fake_learning_rate, and "
            "--learning_rate with it."
        )
        yield "fake_loss", loss > 2.5, text
        asked = "smooth/reward_invalid/"
        for name in [key.removeprefix(asked) for key in self.state if key.startswith(asked)]:
            rose = self._now(f"reward/{name}") > self.state.get(f"first/reward/{name}", math.inf)
            text = (
                f"The reward {name} rises while the student leaves the teacher (distance {gap:.1f} times its lowest): "
                "lower --reward_share, or add --projection_guard."
            )
            yield f"hacking/{name}", rose and gap > 1.5, text
            invalid = self._now(f"reward_invalid/{name}")
            text = (
                f"The reward {name} is not finite for {invalid:.0%} of the samples, which are trained by R_dm alone: "
                "fix the reward, or give prompts that it can score."
            )
            yield f"invalid/{name}", invalid > 0.1, text
