"""The objectives: DMD is DMD2's published gradient, GNDM corrects it with the group, and the rest is arithmetic."""

from __future__ import annotations

import pytest
import torch
from parts import make_estimate
from torch import Tensor
from torch.nn.functional import mse_loss

from rdm_diffusers.distillation import (
    BIAS_ESTIMATORS,
    DMD,
    GNDM,
    NORMALIZATIONS,
    RewardEstimate,
    RunningMeans,
    fake_score_direction,
    normalizer,
    renoising_times,
)
from rdm_diffusers.distillation.advantages import bias_unit, variance_within_groups
from rdm_diffusers.prediction import NoiseSchedule, expand

SHAPE = (8, 4, 8, 8)
GROUP = 4


def estimate(dtype: torch.dtype = torch.float32) -> RewardEstimate:
    """Two groups of four with random predictions."""
    x0, teacher, fake = (torch.randn(SHAPE, dtype=dtype) for _ in range(3))
    sigma = 0.1 + 0.8 * torch.rand(8, dtype=dtype)
    return make_estimate(x0, x0 + 0.3 * teacher, x0 + 0.3 * fake, sigma=sigma)


def corrected(objective: GNDM, e: RewardEstimate) -> Tensor:
    """R' = R + lambda b."""
    advantage = objective.advantage(e, RunningMeans())
    assert torch.equal(advantage.reward, e.reward)
    return advantage.reward + advantage.correction


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
    gndm = GNDM(group_size=group_size, gndm_lambda=0.0, advantage_normalization="sample")
    assert torch.equal(gndm.direction(e), DMD(group_size=group_size).direction(e))
    assert torch.equal(gndm.direction(e), DMD(group_size=1).direction(e))


def test_a_step_against_the_direction_moves_towards_the_teacher_and_away_from_the_fake_score() -> None:
    e = estimate()
    move = -DMD().direction(e)
    assert (move * e.reward).flatten(1).sum(1).min() > 0


def test_a_group_of_one_has_nothing_to_correct_with() -> None:
    e = estimate()
    assert torch.equal(corrected(GNDM(group_size=1, gndm_lambda=1.0), e), e.reward)


@pytest.mark.parametrize("estimator", BIAS_ESTIMATORS)
def test_a_groups_common_bias_is_removed_wholly_at_lambda_one_and_half_at_a_half(estimator: str) -> None:
    x0, teacher, sigma = torch.randn(SHAPE), torch.randn(SHAPE), 0.1 + 0.8 * torch.rand(8)
    bias = torch.randn(2, *SHAPE[1:]).repeat_interleave(GROUP, 0)  # one for each group, in the estimator's units
    perfect = make_estimate(x0, teacher, x0, sigma=sigma)
    unit = bias_unit(perfect, estimator, variance_within_groups(perfect, GROUP, RunningMeans()))
    biased = make_estimate(x0, teacher, x0 + expand(unit, bias) * bias, sigma=sigma)
    objectives = (GNDM(group_size=GROUP, gndm_lambda=strength, bias_estimator=estimator) for strength in (1.0, 0.5))
    whole, half = (corrected(objective, biased) for objective in objectives)
    assert torch.allclose(whole, perfect.reward, atol=1e-5)
    assert torch.allclose(half, (perfect.reward + biased.reward) / 2, atol=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_direction_is_the_gradient_of_the_stated_loss(normalization: str) -> None:
    e = estimate(torch.float64)
    objective = GNDM(group_size=GROUP, gndm_lambda=0.5, advantage_normalization=normalization)
    n = expand(normalizer(e, normalization, GROUP), e.x0)
    x0 = e.x0.clone().requires_grad_()
    target = (x0 + corrected(objective, e) / n).detach()
    expected = torch.autograd.grad(0.5 * mse_loss(x0, target), x0)[0]
    assert torch.allclose(objective.direction(e), expected, atol=1e-15)


def test_an_unknown_normalisation_is_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="Unknown advantage normalization 'max'; use one of sample, group, batch"):
        GNDM(advantage_normalization="max").direction(estimate())


def test_an_unknown_bias_estimator_is_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="Unknown bias estimator 'guess'; use one of shift, noise"):
        GNDM(bias_estimator="guess").direction(estimate())


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_direction_is_finite_where_the_student_has_reached_the_teacher(normalization: str) -> None:
    x0 = torch.randn(SHAPE)
    there = make_estimate(x0, x0, x0)
    objective = GNDM(group_size=GROUP, advantage_normalization=normalization)
    assert torch.equal(objective.direction(there).abs(), torch.zeros(SHAPE))


def test_the_log_ratio_is_positive_for_samples_that_the_teacher_would_rather_have() -> None:
    x0 = torch.randn(SHAPE)
    near_teacher = make_estimate(x0, x0 + 0.1, x0 + 0.5)
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
