"""Rewards without gradients as a tilted target: the fixed point is the teacher times e^{kappa r}, and nothing leaks."""

from __future__ import annotations

import math

import pytest
import torch
from parts import make_estimate
from torch import Tensor

from rdm_diffusers.distillation import (
    GNDMR,
    RunningMeans,
    Samples,
    fake_score_bias,
    standardised_advantage,
    tilted_weight,
)
from rdm_diffusers.families import Conditioning
from rdm_diffusers.training.external_rewards import ExternalRewards

GROUP = 4


def rewarded(kappa: float, group_size: int = GROUP, count: int = 400_000) -> Tensor:
    """Samples `[M]` of N(kappa, 1), which is what N(0, 1) becomes under a tilt of kappa by the reward r(x) = x."""
    return kappa + torch.randn(count // group_size * group_size)


def weights(x: Tensor, kappa: float, group_size: int = GROUP) -> Tensor:
    statistics = RunningMeans()
    return tilted_weight(kappa * standardised_advantage("x", x, group_size, statistics), statistics)


@pytest.mark.parametrize("group_size", [2, 4, 8])
@pytest.mark.parametrize("kappa", [-0.5, 0.25, 0.5])
def test_a_student_that_is_the_teacher_times_e_to_the_kappa_r_looks_like_the_teacher_to_the_fake_score(
    kappa: float, group_size: int
) -> None:
    x = rewarded(kappa, group_size)
    weight = weights(x, kappa, group_size)
    assert weight.mean() == pytest.approx(1, abs=1e-3)
    assert (weight * x).mean() == pytest.approx(0, abs=0.02)
    assert (weight * x**2).mean() == pytest.approx(1, abs=0.05)


def test_the_groups_correction_leaves_that_fixed_point_where_it_is() -> None:
    x, kappa = rewarded(0.5)[:, None, None, None], 0.5
    fake = torch.zeros_like(x)  # at pure noise, the posterior mean of N(0, 1)
    e = make_estimate(x, fake, fake, weight=weights(x.flatten(), kappa))
    assert fake_score_bias(e, GROUP).mean() == pytest.approx(0, abs=0.01)
    unweighted = make_estimate(x, fake, fake)
    assert fake_score_bias(unweighted, GROUP).mean() == pytest.approx(-kappa * 0.25 / 0.25, rel=0.05)


def test_advantages_are_in_standard_deviations_whatever_the_rewards_scale_and_the_prompts_level() -> None:
    values = torch.randn(4000) + 5 * torch.randn(1000).repeat_interleave(GROUP)
    plain = standardised_advantage("x", values, GROUP, RunningMeans())
    assert plain.std() == pytest.approx((4 / 3) ** 0.5, rel=0.03)  # the mean of three others adds a third
    scaled = standardised_advantage("x", 100 * values + 7, GROUP, RunningMeans())
    assert torch.allclose(scaled, plain, atol=1e-2)


def test_no_sample_rules_the_fake_score() -> None:
    weight = tilted_weight(torch.tensor([0.0] * 7 + [-1e9]), RunningMeans())
    assert weight.max() / weight.min() == pytest.approx(math.e**3)


def test_invalid_rewards_groups_of_one_and_equal_rewards_give_no_tilt() -> None:
    nan, inf = torch.nan, torch.inf
    values = torch.tensor([1.0, nan, 3.0, inf, 2.0, nan, nan, nan, 5.0, 5.0, 5.0, 5.0])
    found = standardised_advantage("x", values, GROUP, RunningMeans())
    assert found.isfinite().all()
    assert found[0] == -found[2] != 0
    assert torch.equal(found[[1, 3, *range(4, 12)]], torch.zeros(10))
    for case, size in ((torch.full((8,), nan), 4), (torch.ones(8), 4), (torch.randn(8), 1)):
        assert torch.equal(standardised_advantage("x", case, size, RunningMeans()), torch.zeros(8))


class Box:
    """A reward that is the first pixel, as a number."""

    differentiable = False

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, images: Tensor, prompts: list[str]) -> list[float]:
        return images[:, 0, 0, 0].tolist()


def tilted(names: dict[str, float]) -> tuple[Samples, dict[str, Tensor]]:
    """Samples weighted by black boxes of these names and weights."""
    combination = GNDMR(group_size=GROUP, weights=names)
    rewards = ExternalRewards(
        rewards=[Box(name) for name in names], combination=combination, decode=lambda z: z, micro_batch_size=3,
        reward_tilt=0.5,
    )  # fmt: skip
    x0, step = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(2)), torch.tensor([0] * 4 + [2] * 4)
    samples = Samples(x0, step, x0, step, Conditioning({"prompt_embeds": torch.zeros(8, 1)}))
    return rewards.tilt(samples, ["prompt"] * 8, RunningMeans())


def test_rewards_share_the_tilt_by_their_weights() -> None:
    alone, health = tilted({"a": 1.0})
    both, _ = tilted({"a": 3.0, "b": 1.0})
    against, _ = tilted({"a": 1.0, "b": -1.0})
    assert torch.allclose(both.weight, alone.weight)
    assert torch.allclose(against.weight, torch.ones(8))
    assert (alone.x0[:, 0, 0, 0] > alone.x0[:, 0, 0, 0].mean())[alone.weight.argmin()]
    assert {"reward/a", "reward_invalid/a", "reward/a/step_3", "reward_std/a/step_1"} <= health.keys()


def test_without_black_boxes_the_samples_stay_as_they_are() -> None:
    samples, health = tilted({})
    assert samples.weight is None
    assert health == {}
