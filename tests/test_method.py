"""The objectives: DMD is DMD2's published gradient, GNDM corrects it with the group, and the rest is arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from rdm_diffusers.distillation import (
    DMD,
    GNDM,
    NORMALIZATIONS,
    RewardEstimate,
    fake_score_bias,
    fake_score_direction,
    leave_one_out_mean,
    normalizer,
    renoising_times,
)
from rdm_diffusers.prediction import NoiseSchedule, expand

SHAPE = (8, 4, 8, 8)
GROUP = 4


def estimate(dtype: torch.dtype = torch.float32) -> RewardEstimate:
    """Two groups of four with random predictions."""
    x0, teacher, fake = (torch.randn(SHAPE, dtype=dtype) for _ in range(3))
    return RewardEstimate(x0, x0 + 0.3 * teacher, x0 + 0.3 * fake, torch.rand(8, dtype=dtype) + 0.1)


def dmd2_gradient(x0: Tensor, pred_real: Tensor, pred_fake: Tensor) -> Tensor:
    """The gradient of DMD2's generator loss, written as in its published code."""
    latents = x0.clone().requires_grad_()
    p_real, p_fake = latents - pred_real, latents - pred_fake
    with torch.no_grad():
        grad = (p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3], keepdim=True)
    loss = 0.5 * mse_loss(latents, (latents - grad).detach(), reduction="mean")
    return torch.autograd.grad(loss, latents)[0]


# In float64 both round alike; in float32 the published form first adds x0 to the gradient and takes it away again.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 1e-7)])
def test_dmd_is_dmd2s_published_gradient(dtype: torch.dtype, tolerance: float) -> None:
    e = estimate(dtype)
    difference = (DMD().direction(e) - dmd2_gradient(e.x0, e.teacher_x0, e.fake_x0)).abs().max()
    assert difference <= tolerance


@pytest.mark.parametrize("group_size", [1, 4])
def test_gndm_without_correction_and_with_the_sample_normaliser_is_dmd(group_size: int) -> None:
    e = estimate()
    gndm = GNDM(group_size, gndm_lambda=0.0, normalization="sample")
    assert torch.equal(gndm.direction(e), DMD(group_size).direction(e))
    assert torch.equal(gndm.direction(e), DMD(1).direction(e))


def test_a_step_against_the_direction_moves_towards_the_teacher_and_away_from_the_fake_score() -> None:
    e = estimate()
    move = -DMD().direction(e)
    assert (move * e.reward).flatten(1).sum(1).min() > 0


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_leave_one_out_mean_is_the_mean_of_the_others(group_size: int) -> None:
    values = torch.randn(SHAPE)
    means = leave_one_out_mean(values, group_size)
    for i in range(len(values)):
        first = i - i % group_size
        others = [values[j] for j in range(first, first + group_size) if j != i]
        assert torch.allclose(means[i], torch.stack(others).mean(0), atol=1e-6)


def test_a_group_of_one_has_nothing_to_correct_with() -> None:
    e = estimate()
    assert torch.equal(leave_one_out_mean(e.reward, 1), torch.zeros(SHAPE))
    assert torch.equal(GNDM(1, gndm_lambda=1.0).corrected_reward(e), e.reward)


def test_the_bias_is_the_leave_one_out_mean_in_the_samples_own_noise_units() -> None:
    e = estimate()
    residual = (e.fake_x0 - e.x0) / e.sigma[:, None, None, None]
    bias = fake_score_bias(e.residual, e.sigma, GROUP)
    for i in range(len(residual)):
        first = i - i % GROUP
        others = torch.stack([residual[j] for j in range(first, first + GROUP) if j != i])
        assert torch.allclose(bias[i], e.sigma[i] * others.mean(0), atol=1e-5)


def test_a_fake_scores_constant_bias_is_removed_wholly_at_lambda_one_and_half_at_a_half() -> None:
    x0, teacher, sigma = torch.randn(SHAPE), torch.randn(SHAPE), torch.rand(8) + 0.1
    bias = torch.randn(2, *SHAPE[1:]).repeat_interleave(GROUP, 0)  # one for each group, in noise units
    perfect = RewardEstimate(x0, teacher, x0, sigma)
    biased = RewardEstimate(x0, teacher, x0 + expand(sigma, bias) * bias, sigma)
    assert torch.allclose(GNDM(GROUP, 1.0).corrected_reward(biased), perfect.reward, atol=1e-5)
    half = GNDM(GROUP, 0.5).corrected_reward(biased)
    assert torch.allclose(half, (perfect.reward + biased.reward) / 2, atol=1e-5)


def test_the_correction_averages_to_nothing_where_the_fake_score_is_perfect() -> None:
    groups = 4096
    residual = torch.randn(groups * GROUP, 1, 1, 1)  # the posterior mean's residuals have mean zero
    sigma = torch.full((len(residual),), 0.5)
    assert fake_score_bias(residual, sigma, GROUP).mean().abs() < 0.02


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_every_normaliser_is_what_it_says(normalization: str) -> None:
    e = estimate()
    distance = torch.stack([(e.x0[i] - e.teacher_x0[i]).abs().mean() for i in range(8)])
    groups = [distance[i - i % GROUP : i - i % GROUP + GROUP] for i in range(8)]
    expected = {
        "sample": list(distance),
        "group": [group.mean() for group in groups],
        "batch": [distance.mean()] * 8,
        "none": [1.0] * 8,
    }
    assert torch.allclose(e.distance, distance)
    assert torch.allclose(normalizer(e.distance, normalization, GROUP), torch.tensor(expected[normalization]))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_direction_is_the_gradient_of_the_stated_loss(normalization: str) -> None:
    e, objective = estimate(torch.float64), GNDM(GROUP, 0.5, normalization)
    n = expand(normalizer(e.distance, normalization, GROUP), e.x0)
    x0 = e.x0.clone().requires_grad_()
    target = (x0 + objective.corrected_reward(e) / n).detach()
    expected = torch.autograd.grad(0.5 * mse_loss(x0, target), x0)[0]
    assert torch.allclose(objective.direction(e), expected, atol=1e-15)


def test_an_unknown_normalisation_is_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="Unknown advantage normalization 'std'; use one of sample, group, batch"):
        GNDM(normalization="std").direction(estimate())


def test_the_direction_is_finite_where_the_student_has_reached_the_teacher() -> None:
    x0 = torch.randn(SHAPE)
    there = RewardEstimate(x0, x0, x0, torch.full((8,), 0.5))
    assert torch.equal(DMD().direction(there).abs(), torch.zeros(SHAPE))


def test_the_log_ratio_is_positive_for_samples_that_the_teacher_would_rather_have() -> None:
    x0 = torch.randn(SHAPE)
    near_teacher = RewardEstimate(x0, x0 + 0.1, x0 + 0.5, torch.full((8,), 0.5))
    assert torch.allclose(near_teacher.log_ratio, torch.full((8,), 0.24), atol=1e-4)


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_fake_score_direction_is_the_gradient_of_the_weighted_squared_error(micro_batch: int) -> None:
    prediction, x0, weight = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE), torch.rand(8) + 0.1
    loss = (expand(weight, x0) * (prediction - x0) ** 2).mean()
    expected = torch.autograd.grad(loss, prediction)[0]
    parts = [
        fake_score_direction(prediction[i : i + micro_batch], x0[i : i + micro_batch], weight[i : i + micro_batch], 8)
        for i in range(0, 8, micro_batch)
    ]
    assert torch.allclose(torch.cat([direction for direction, _ in parts]), expected, atol=1e-8)
    assert torch.allclose(torch.cat([each for _, each in parts]).mean(), loss)


@pytest.mark.parametrize("alphas_cumprod", [None, torch.linspace(0.99, 0.01, 1000)])
def test_renoising_times_cover_dmd2s_range_evenly(alphas_cumprod: Tensor | None) -> None:
    schedule = NoiseSchedule(alphas_cumprod)
    tau = renoising_times(torch.linspace(0, 1 - 1e-6, 9601), schedule)
    assert 20 <= tau.min() < 21
    assert 979 <= tau.max() <= 980
    assert abs(tau.double().mean() - 500) < 1
    assert tau.is_floating_point() is schedule.is_flow
