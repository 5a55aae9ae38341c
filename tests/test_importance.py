"""Importance sampling: exact likelihood ratios of stored rollouts, and the weights that are made of them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from parts import make_conditioning
from parts_float64 import ROUNDING
from torch import Tensor
from torch.distributions import Normal

from rdm_diffusers.distillation import (
    IMPORTANCE_WEIGHTINGS,
    Step,
    importance_health,
    importance_weights,
    log_ratios,
    revisit,
    rollout,
)
from rdm_diffusers.families import Conditioning
from rdm_diffusers.schedulers import RdmScheduler

STEPS = 4


def student(x_t: Tensor, t: Tensor, conditioning: Conditioning, gain: float = 0.5) -> Tensor:
    """A student of which everything is known; another `gain` is the student after an update."""
    offset = conditioning.tensors["prompt_embeds"].mean((1, 2)) + t / 1000
    return gain * x_t + offset[:, None, None, None]


def four_steps(**options) -> RdmScheduler:
    scheduler = RdmScheduler(**options)
    scheduler.set_timesteps(STEPS)
    return scheduler


def old_and_new(gain: float, count: int = 6, shape: tuple = (4, 8, 8), **options) -> tuple[list[Step], list[Step]]:
    """Rollouts, and the same states as a student of another gain sees them."""
    scheduler, conditioning = four_steps(**options), make_conditioning(1).expand(count)
    then = list(rollout(student, scheduler, [torch.randn(count, *shape) for _ in range(STEPS)], conditioning))
    return then, list(revisit(partial(student, gain=gain), scheduler, then, conditioning, micro_batch_size=4000))


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
@pytest.mark.usefixtures("float64")
def test_a_revisit_keeps_the_states_and_predicts_and_steps_anew(prediction_type: str) -> None:
    then, now = old_and_new(0.6, prediction_type=prediction_type)
    scheduler, conditioning = four_steps(prediction_type=prediction_type), make_conditioning(1).expand(6)
    for new, old in zip(now, then, strict=True):
        assert (new.k, new.t, new.std) == (old.k, old.t, old.std)
        assert torch.equal(new.x_t, old.x_t)
        x0 = student(old.x_t, old.t.expand(6), conditioning, gain=0.6)
        assert torch.allclose(new.x0, x0, atol=ROUNDING)
        mean, _ = scheduler.transition(x0, old.x_t, old.t, scheduler.previous_timestep(old.t))
        assert torch.allclose(new.mean, mean, atol=ROUNDING)


@pytest.mark.usefixtures("float64")
def test_a_revisit_does_not_depend_on_its_micro_batches() -> None:
    then, now = old_and_new(0.6)
    pieces = revisit(partial(student, gain=0.6), four_steps(), then, make_conditioning(1).expand(6), 4)
    for piece, step in zip(pieces, now, strict=True):
        assert torch.allclose(piece.x0, step.x0, atol=ROUNDING)
        assert torch.allclose(piece.mean, step.mean, atol=ROUNDING)


def test_the_ratios_of_a_student_that_did_not_change_are_one() -> None:
    then, now = old_and_new(0.5)
    assert torch.equal(log_ratios(now, then), torch.zeros(STEPS, 6, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"eta": 0.5}, {"prediction_type": "flow_prediction"}], ids=str)
def test_the_log_ratio_of_a_state_is_the_sum_of_its_transitions_log_densities(options: dict) -> None:
    then, now = old_and_new(0.52, **options)
    found = log_ratios(now, then)
    assert found.dtype == torch.float64
    expected = torch.zeros(6, dtype=torch.float64)
    for k in range(STEPS):
        assert torch.allclose(found[k], expected, rtol=1e-9, atol=1e-9)  # the first state is everyone's
        if k < STEPS - 1:
            densities = [
                Normal(steps[k].mean.double(), then[k].std.double()).log_prob(then[k + 1].x_t.double())
                for steps in (now, then)
            ]
            expected = expected + (densities[0] - densities[1]).flatten(1).sum(1)
    assert expected.abs().min() > 1e-3


def test_deterministic_transitions_have_no_ratio() -> None:
    then, now = old_and_new(0.6, eta=0.0)
    assert torch.equal(log_ratios(now, then), torch.zeros(STEPS, 6, dtype=torch.float64))


def test_the_ratios_average_to_one_and_their_logarithms_to_minus_the_divergence() -> None:
    then, now = old_and_new(0.6, count=20_000, shape=(1, 1, 2), prediction_type="flow_prediction")
    ratio = log_ratios(now, then)
    assert ratio[1:].exp().mean(1).tolist() == pytest.approx([1] * 3, abs=0.02)
    # Of Gaussians of one width: half the squared distance of their means; it adds up over the transitions.
    distances = [(new.mean - old.mean) / old.std for new, old in zip(now[:-1], then[:-1], strict=True)]
    divergence = sum(distance.square().flatten(1).sum(1).mean() for distance in distances).item() / 2
    assert importance_health(ratio[-1])["drift"] == pytest.approx(divergence, rel=0.1)
    assert divergence > 0.05


def test_no_weighting_is_ones_and_equal_ratios_have_the_full_effective_sample_size() -> None:
    ratio = torch.full((16,), 0.7, dtype=torch.float64)
    assert torch.equal(importance_weights(ratio, "none"), torch.ones(16))
    assert torch.allclose(importance_weights(ratio, "self_normalized"), torch.ones(16))
    health = importance_health(ratio)
    assert health["effective_sample_size"] == pytest.approx(1)
    assert health["clip_fraction"] == 1  # e^.7 is 2
    assert health["drift"] == pytest.approx(-0.7)


def test_one_ratio_above_all_others_leaves_an_effective_sample_of_one() -> None:
    ratio = torch.zeros(16, dtype=torch.float64)
    ratio[3] = 800  # whose exponential is infinite
    assert importance_health(ratio)["effective_sample_size"] == pytest.approx(1 / 16)
    assert all(importance_weights(ratio, weighting).isfinite().all() for weighting in IMPORTANCE_WEIGHTINGS)


def test_clipped_weights_are_the_ratios_within_a_fifth_of_one() -> None:
    weights = importance_weights(torch.tensor([-3.0, math.log(0.9), 0.0, math.log(1.1), 3.0]).double(), "clipped")
    assert weights.tolist() == pytest.approx([0.8, 0.9, 1.0, 1.1, 1.2])
    assert weights.dtype == torch.float32


def test_self_normalised_weights_are_the_ratios_over_their_mean() -> None:
    ratio = torch.randn(64).double()
    weights = importance_weights(ratio, "self_normalized")
    assert weights.mean() == pytest.approx(1)
    assert torch.allclose(weights, (ratio.exp() / ratio.exp().mean()).float())


def test_an_unknown_weighting_is_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="Unknown importance weighting 'ppo'; use one of none, clipped, self_norm"):
        importance_weights(torch.zeros(2), "ppo")
