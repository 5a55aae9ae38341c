"""What every scheduler of diffusers promises, held by ours: configurations, compatible schedulers, betas, outputs."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from rdm_diffusers.schedulers import RdmScheduler

SHAPE = (4, 3, 8, 8)
BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
every = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])


def make(prediction_type: str = "epsilon", **changes) -> RdmScheduler:
    return RdmScheduler(**BETAS, prediction_type=prediction_type, **changes)


def random_call() -> tuple[torch.Tensor, torch.Tensor]:
    """A network's output and a sample."""
    return 0.1 * torch.randn(SHAPE), torch.randn(SHAPE)


@every
def test_a_saved_scheduler_has_the_same_configuration_and_steps_alike(prediction_type: str, tmp_path: Path) -> None:
    scheduler = make(prediction_type, eta=0.5)
    scheduler.save_pretrained(tmp_path)
    again = RdmScheduler.from_pretrained(tmp_path)
    assert {k: v for k, v in scheduler.config.items() if k != "_use_default_values"} == dict(again.config)
    output, sample = random_call()
    results = []
    for each in (scheduler, again):
        each.set_timesteps(10)
        generator = torch.Generator().manual_seed(0)
        results.append(each.step(output, each.timesteps[3], sample, generator=generator).prev_sample)
    assert torch.equal(*results)


def test_its_configuration_survives_every_compatible_scheduler() -> None:
    scheduler = make()
    assert len(scheduler.compatibles) > 5
    for compatible in scheduler.compatibles:
        back = RdmScheduler.from_config(compatible.from_config(scheduler.config).config)
        assert {k: v for k, v in back.config.items() if k in scheduler.config} == dict(scheduler.config)
        added = {k for k in back.config if k not in scheduler.config}
        assert not added & set(inspect.signature(RdmScheduler.__init__).parameters)


def test_betas_may_be_given_and_are_saved(tmp_path: Path) -> None:
    scheduler = make(trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    assert (
        scheduler.betas.tolist() == RdmScheduler.from_pretrained(tmp_path).betas.tolist() == pytest.approx([0.1, 0.3])
    )


@every
def test_an_output_is_the_same_as_a_tuple(prediction_type: str) -> None:
    scheduler, (output, sample) = make(prediction_type), random_call()
    scheduler.set_timesteps(10)
    calls = [
        scheduler.step(output, scheduler.timesteps[0], sample, torch.Generator().manual_seed(0), return_dict=kind)
        for kind in (True, False)
    ]
    assert torch.equal(calls[0].prev_sample, calls[1][0])
    assert torch.equal(calls[0].pred_original_sample, calls[1][1])


@every
def test_noise_is_added_at_a_time_of_the_grid(prediction_type: str) -> None:
    scheduler, (noise, sample) = make(prediction_type), random_call()
    scheduler.set_timesteps(100)
    assert scheduler.scale_model_input(sample, 0.0).shape == SHAPE
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.add_noise(sample, noise, scheduler.timesteps[5][None]).shape == SHAPE


def test_configuration_values_are_read_from_the_configuration() -> None:
    scheduler = make()
    scheduler.register_to_config(test_attribute=5)
    with pytest.warns(FutureWarning):
        assert scheduler.test_attribute == 5
    with pytest.raises(AttributeError, match="'RdmScheduler' object has no attribute 'does_not_exist'"):
        _ = scheduler.does_not_exist


def test_explicit_timesteps_and_sigmas_lay_the_grid() -> None:
    scheduler = make()
    scheduler.set_timesteps(timesteps=np.array([900, 300, 10]))
    assert scheduler.timesteps.tolist() == [900, 300, 10]
    flow = make("flow_prediction")
    flow.set_timesteps(sigmas=np.linspace(1, 0.25, 4))
    assert flow.sigmas.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_x0_of_a_step_is_the_stock_schedulers_own(prediction_type: str) -> None:
    ours, stock = make(prediction_type), DDIMScheduler(**BETAS, prediction_type=prediction_type, clip_sample=False)
    output, sample = random_call()
    stock.set_timesteps(10)
    ours.set_timesteps(timesteps=stock.timesteps)
    for time in stock.timesteps:
        x0 = stock.step(output, time, sample).pred_original_sample
        assert torch.allclose(ours.step(output, time, sample).pred_original_sample, x0, rtol=1e-5, atol=1e-5)


def test_the_x0_of_a_flow_step_is_the_stock_schedulers_own() -> None:
    ours, stock = make("flow_prediction", eta=0.0), FlowMatchEulerDiscreteScheduler()
    output, sample = random_call()
    for each in (ours, stock):
        each.set_timesteps(sigmas=[0.7])
    x0 = stock.step(output, stock.timesteps[0], sample).prev_sample
    assert torch.allclose(ours.step(output, ours.timesteps[0], sample).pred_original_sample, x0, atol=1e-5)
