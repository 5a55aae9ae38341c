"""RdmScheduler is, on the same grid, LCM, stochastic and deterministic Euler, and DDIM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from parts import make_pipeline
from torch import Tensor

from rdm_diffusers.families import Teacher
from rdm_diffusers.families.sd_unet import StableDiffusionFamily
from rdm_diffusers.schedulers import RdmScheduler
from rdm_diffusers.training.assembly import make_scheduler

SHAPE = (3, 4, 8, 8)
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
STEPS = [1, 2, 4, 8]


def some_network(x_t: Tensor, t: Tensor) -> Tensor:
    """A bounded output that depends on the sample and the time, as a denoiser's does."""
    return torch.tanh(1.3 * x_t.roll(1, -1) + 0.2 * x_t + float(t) / 1000)


def sample(scheduler, steps: int, network: Callable = some_network, **options) -> Tensor:
    """Samples as a stock pipeline does, from the same noise every time."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(SHAPE, generator=generator)
    for t in scheduler.timesteps:
        x_t = scheduler.step(network(x_t, t), t, x_t, generator=generator, return_dict=False, **options)[0]
    return x_t


def euler_on_the_even_grid(steps: int, stochastic: bool) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' Euler with sigmas 1, 1 - 1/K, ..., 1/K."""
    terminal = 1 / steps if steps > 1 else None  # diffusers divides by 1 - shift_terminal
    return FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=terminal, stochastic_sampling=stochastic)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_eta_one_is_lcm_on_the_same_grid(steps: int, prediction_type: str) -> None:
    lcm = LCMScheduler(
        original_inference_steps=steps, timestep_spacing="trailing", clip_sample=False,
        prediction_type=prediction_type, **BETAS,
    )  # fmt: skip
    ours = sample(RdmScheduler(prediction_type=prediction_type), steps)
    theirs = sample(lcm, steps)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("steps", STEPS)
def test_eta_one_of_a_flow_is_stochastic_euler(steps: int) -> None:
    ours = sample(RdmScheduler(prediction_type="flow_prediction"), steps)
    theirs = sample(euler_on_the_even_grid(steps, stochastic=True), steps)
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("steps", STEPS)
def test_eta_zero_of_a_flow_is_deterministic_euler(steps: int) -> None:
    ours = sample(RdmScheduler(prediction_type="flow_prediction", eta=0.0), steps)
    theirs = sample(euler_on_the_even_grid(steps, stochastic=False), steps)
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_eta_zero_is_ddim(steps: int, prediction_type: str) -> None:
    ddim = DDIMScheduler(
        set_alpha_to_one=True, timestep_spacing="trailing", clip_sample=False, prediction_type=prediction_type, **BETAS
    )
    ours = sample(RdmScheduler(prediction_type=prediction_type, eta=0.0), steps)
    theirs = sample(ddim, steps, eta=0.0)
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("steps", range(1, 9))
def test_a_student_is_trained_on_the_grid_that_the_exported_stock_scheduler_lays_by_itself(
    steps: int, tmp_path: Path
) -> None:
    teacher = Teacher(make_pipeline(), StableDiffusionFamily(), "teacher")
    StableDiffusionFamily().stock_scheduler(teacher.pipeline.scheduler, steps).save_pretrained(tmp_path)
    stock = LCMScheduler.from_pretrained(tmp_path)
    ours = make_scheduler(teacher, steps, eta=1.0)
    stock.set_timesteps(steps)
    ours.set_timesteps(steps)
    assert stock.timesteps.tolist() == ours.timesteps.tolist()
    assert len(ours.timesteps) == steps
    assert ours.timesteps[0] >= 990


def test_a_students_grid_survives_saving(tmp_path: Path) -> None:
    scheduler = RdmScheduler(student_timesteps=[999, 600, 300], eta=0.5, **BETAS)
    scheduler.save_pretrained(tmp_path)
    again = RdmScheduler.from_pretrained(tmp_path)
    assert again.timesteps.tolist() == [999, 600, 300]
    again.set_timesteps(3)
    assert again.timesteps.tolist() == [999, 600, 300]
    assert again.config.eta == 0.5


def test_a_flow_students_grid_survives_saving_and_is_never_shifted_again(tmp_path: Path) -> None:
    scheduler = RdmScheduler(prediction_type="flow_prediction", student_sigmas=[1.0, 0.9, 0.75, 0.5], shift=3.0)
    scheduler.save_pretrained(tmp_path)
    again = RdmScheduler.from_pretrained(tmp_path)
    again.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.7)  # as stock flow pipelines do
    assert torch.allclose(again.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


def test_another_number_of_steps_than_the_students_lays_a_trailing_grid() -> None:
    scheduler = RdmScheduler(student_timesteps=[999, 600, 300])
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_a_flow_grid_is_shifted_as_diffusers_shifts() -> None:
    ours = RdmScheduler(prediction_type="flow_prediction", shift=3.0)
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours.set_timesteps(4)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert torch.allclose(ours.sigmas, theirs.sigmas, atol=1e-6)


def test_it_loads_from_a_teachers_scheduler_configuration() -> None:
    teacher = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, **BETAS)
    scheduler = RdmScheduler.from_config({**teacher.config, "timestep_spacing": "trailing"})
    assert torch.equal(scheduler.alphas_cumprod, teacher.alphas_cumprod)
    assert scheduler.config.prediction_type == "v_prediction"


def test_noise_is_added_as_diffusers_adds_it_and_velocity_is_as_diffusers_has_it() -> None:
    ours, theirs, t = RdmScheduler(), DDIMScheduler(**BETAS), torch.tensor([10, 500, 999])
    x0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    assert torch.allclose(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), atol=1e-6)
    assert torch.allclose(ours.scale_noise(x0, t, noise), theirs.add_noise(x0, noise, t), atol=1e-6)
    assert torch.allclose(ours.get_velocity(x0, noise, t), theirs.get_velocity(x0, noise, t), atol=1e-6)
