"""The conversions between a denoiser's output and x0, and the noise schedules behind them."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from rdm_diffusers.prediction import PREDICTION_TYPES, NoiseSchedule, denoising_weight, expand, from_x0, to_x0

SHAPE = (6, 4, 8, 8)
TIMES = torch.tensor([1, 20, 249, 499, 749, 999])


def schedule_of(prediction_type: str) -> NoiseSchedule:
    """The schedule that a prediction type is used with."""
    if prediction_type == "flow_prediction":
        return NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    return NoiseSchedule.from_scheduler(DDIMScheduler())


def noisy(schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor]:
    """x0, noise and x_t at `TIMES`."""
    x0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    return x0, noise, schedule.add_noise(x0, noise, TIMES)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_from_x0_inverts_to_x0(prediction_type: str) -> None:
    schedule = schedule_of(prediction_type)
    x0, _, x_t = noisy(schedule)
    scales = schedule.scales(TIMES, x_t)
    back = to_x0(prediction_type, from_x0(prediction_type, x0, x_t, *scales), x_t, *scales)
    assert torch.allclose(back, x0, atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_to_x0_inverts_from_x0(prediction_type: str) -> None:
    schedule = schedule_of(prediction_type)
    _, _, x_t = noisy(schedule)
    output, scales = torch.randn(SHAPE), schedule.scales(TIMES, x_t)
    back = from_x0(prediction_type, to_x0(prediction_type, output, x_t, *scales), x_t, *scales)
    # At time 1 the noise scale is .03 (flow: .001), by which from_x0 divides a rounding error.
    assert torch.allclose(back, output, atol=2e-3)


def test_the_true_noise_as_epsilon_gives_the_true_x0() -> None:
    schedule = schedule_of("epsilon")
    x0, noise, x_t = noisy(schedule)
    assert torch.allclose(to_x0("epsilon", noise, x_t, *schedule.scales(TIMES, x_t)), x0, atol=1e-4)


def test_the_true_velocity_of_diffusers_gives_the_true_x0() -> None:
    schedule = schedule_of("v_prediction")
    x0, noise, x_t = noisy(schedule)
    velocity = DDIMScheduler().get_velocity(x0, noise, TIMES)
    assert torch.allclose(to_x0("v_prediction", velocity, x_t, *schedule.scales(TIMES, x_t)), x0, atol=1e-5)


def test_noise_minus_x0_as_flow_gives_the_true_x0() -> None:
    schedule = schedule_of("flow_prediction")
    x0, noise, x_t = noisy(schedule)
    assert torch.allclose(to_x0("flow_prediction", noise - x0, x_t, *schedule.scales(TIMES, x_t)), x0, atol=1e-5)


def test_v_prediction_and_flow_prediction_are_not_the_same_thing() -> None:
    schedule = schedule_of("flow_prediction")
    x0, noise, x_t = noisy(schedule)
    scales = schedule.scales(TIMES, x_t)
    as_flow = to_x0("flow_prediction", noise - x0, x_t, *scales)
    as_v = to_x0("v_prediction", noise - x0, x_t, *scales)
    assert (as_flow - as_v)[1:].abs().flatten(1).mean(1).min() > 0.01


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
def test_the_denoising_weight_turns_an_error_of_x0_into_one_of_velocity(prediction_type: str) -> None:
    schedule = schedule_of(prediction_type)
    _, _, x_t = noisy(schedule)
    x_t, (alpha, sigma) = x_t.double(), schedule.scales(TIMES, x_t)
    output, error = torch.randn(SHAPE), torch.randn(SHAPE)
    wrong = to_x0(prediction_type, output + error, x_t, alpha, sigma)
    difference = (wrong - to_x0(prediction_type, output, x_t, alpha, sigma)).square().flatten(1).sum(1)
    measured = error.square().flatten(1).sum(1) / difference
    weight = denoising_weight(schedule.sigma(TIMES))
    # At a flow time of .001 the x0 difference is itself a rounding error.
    assert torch.allclose(weight[1:], measured[1:], rtol=1e-3)


@pytest.mark.parametrize("convert", [to_x0, from_x0])
def test_an_unknown_prediction_type_is_one_clear_sentence(convert) -> None:
    ones = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"Unknown prediction type 'velocity'; use one of epsilon, v_prediction, "):
        convert("velocity", ones, ones, ones, ones)


def test_variance_preserving_noise_is_that_of_diffusers() -> None:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    ours = NoiseSchedule.from_scheduler(scheduler).add_noise(x0, noise, TIMES)
    assert torch.allclose(ours, scheduler.add_noise(x0, noise, TIMES), atol=1e-6)


def test_flow_noise_is_that_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    x0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    ours = NoiseSchedule.from_scheduler(scheduler).add_noise(x0, noise, scheduler.timesteps)
    assert torch.allclose(ours, scheduler.scale_noise(x0, scheduler.timesteps, noise), atol=1e-6)


def test_a_scheduler_with_alphas_preserves_variance_and_one_without_is_a_flow() -> None:
    preserving = NoiseSchedule.from_scheduler(DDIMScheduler())
    flow = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    assert not preserving.is_flow
    assert torch.allclose(preserving.alpha(TIMES) ** 2 + preserving.sigma(TIMES) ** 2, torch.ones(len(TIMES)))
    assert flow.is_flow
    assert torch.allclose(flow.alpha(TIMES) + flow.sigma(TIMES), torch.ones(len(TIMES)))


def test_conversions_compute_in_float32_and_pass_gradients_to_output_and_sample() -> None:
    schedule = schedule_of("epsilon")
    _, _, x_t = noisy(schedule)
    x_t, output = x_t.bfloat16().requires_grad_(), torch.randn(SHAPE).bfloat16().requires_grad_()
    x0 = to_x0("epsilon", output, x_t, *schedule.scales(TIMES, x_t))
    x0.sum().backward()
    assert x0.dtype == torch.float32
    assert output.grad.abs().min() > 0
    assert x_t.grad.abs().min() > 0


def test_expand_lets_per_sample_values_multiply_pictures() -> None:
    values = torch.arange(6.0)
    assert torch.equal((expand(values, torch.ones(SHAPE)) * torch.ones(SHAPE))[:, 0, 0, 0], values)
    assert expand(torch.tensor(2.0), torch.ones(SHAPE)).ndim == 0
