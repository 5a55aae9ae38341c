"""Which grid RdmScheduler lays, what it refuses, what it makes of stock configurations; and whole loops without NaN."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from rdm_diffusers.families import FAMILIES
from rdm_diffusers.schedulers import RdmScheduler

SHAPE = (3, 4, 8, 8)
SCHEDULES = [
    dict(beta_schedule=kind, rescale_betas_zero_snr=zero)
    for kind in ("linear", "scaled_linear", "squaredcos_cap_v2")
    for zero in (False, True)
]
FLOW = dict(prediction_type="flow_prediction")
flows = pytest.mark.parametrize("student_steps", [1, 2, 4])


def even(count: int) -> list[float]:
    return [(count - i) / count for i in range(count)]


def flow_student(steps: int, **changes) -> tuple[RdmScheduler, FlowMatchEulerDiscreteScheduler]:
    """A student's scheduler, and the stock one that it is exported with."""
    ours = RdmScheduler(**FLOW, student_sigmas=even(steps), **changes)
    return ours, FAMILIES["FluxPipeline"].stock_scheduler(ours, steps)


def whole_loop(scheduler: RdmScheduler) -> torch.Tensor:
    """Sampling with a network whose outputs are as large as a denoiser's."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(SHAPE, generator=generator)
    for t in scheduler.timesteps:
        output = torch.tanh(sample.roll(1, -1) + float(t) / 1000)
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
        assert sample.isfinite().all()
    return sample


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_whole_loop_of_every_schedule_is_finite_at_every_number_of_steps(
    prediction_type: str, schedule: dict, eta: float
) -> None:
    if prediction_type == "epsilon" and schedule["rescale_betas_zero_snr"]:
        pytest.skip("refused, as another test states")
    for steps in range(1, 9):
        scheduler = RdmScheduler(prediction_type=prediction_type, eta=eta, **schedule)
        scheduler.set_timesteps(steps)
        whole_loop(scheduler)
        scheduler.set_timesteps(timesteps=[*scheduler.timesteps.tolist(), 0])
        whole_loop(scheduler)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_flow_sigmas_that_end_in_zero_are_finite_and_add_nothing(eta: float) -> None:
    for steps in range(1, 9):
        scheduler = RdmScheduler(**FLOW, eta=eta, shift=3.0)
        scheduler.set_timesteps(sigmas=even(steps))
        without = whole_loop(scheduler)
        scheduler.set_timesteps(sigmas=[*even(steps), 0.0])
        assert scheduler.sigmas[-2:].tolist() == [0, 0]
        assert torch.equal(whole_loop(scheduler), without)
    student = RdmScheduler(**FLOW, eta=eta, student_sigmas=[1.0, 0.5, 0.0])
    assert len(student.timesteps) == 3
    whole_loop(student)


def test_a_time_without_noise_is_finite_for_betas_that_begin_with_zero() -> None:
    scheduler = RdmScheduler(trained_betas=[0.0, 0.1, 0.3])
    scheduler.set_timesteps(timesteps=[2, 0])
    whole_loop(scheduler)


def test_epsilon_prediction_with_zero_terminal_snr_is_refused() -> None:
    said = "Epsilon prediction with zero terminal SNR does not determine x0 at the noisiest time; set rescale_betas"
    with pytest.raises(ValueError, match=said):
        RdmScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=said):
        RdmScheduler.from_config(EulerDiscreteScheduler(rescale_betas_zero_snr=True).config)
    with pytest.raises(ValueError, match=said):
        RdmScheduler(trained_betas=[0.1, 1.0])


@pytest.mark.parametrize("name", RdmScheduler._compatibles)
@pytest.mark.parametrize("saved", [False, True])
def test_a_stock_schedulers_noise_schedule_is_taken_with_the_defaults_of_its_own_class(
    name: str, saved: bool, tmp_path: Path
) -> None:
    stock = getattr(diffusers, name)()
    stock.save_pretrained(tmp_path)
    ours = RdmScheduler.from_pretrained(tmp_path) if saved else RdmScheduler.from_config(stock.config)
    assert ours.schedule.is_flow == name.startswith("FlowMatch")
    if not ours.schedule.is_flow:
        assert torch.equal(ours.alphas_cumprod, stock.alphas_cumprod)


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_configuration_that_says_little_is_read_as_its_class_reads_it(name: str) -> None:
    stock = getattr(diffusers, name).from_config({"_class_name": name})
    ours = RdmScheduler.from_config({"_class_name": name})
    assert ours.schedule.is_flow == (not hasattr(stock, "alphas_cumprod"))
    assert ours.schedule.is_flow or torch.equal(ours.alphas_cumprod, stock.alphas_cumprod)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("stock", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, LCMScheduler])
def test_a_stock_schedulers_prediction_type_is_taken_and_its_spacing_is_not(stock: type, prediction_type: str) -> None:
    if stock is PNDMScheduler and prediction_type == "sample":
        pytest.skip("PNDMScheduler does not know it")
    theirs = stock(prediction_type=prediction_type, timestep_spacing="leading")
    ours = RdmScheduler.from_config(theirs.config)
    assert (ours.config.prediction_type, ours.config.timestep_spacing) == (prediction_type, "trailing")


@pytest.mark.parametrize(
    "stock",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=lambda stock: type(stock).__name__,
)
def test_a_flow_schedulers_shift_is_taken(stock) -> None:
    ours = RdmScheduler.from_config(stock.config)
    assert ours.schedule.is_flow and ours.config.shift == 3.0


@pytest.mark.parametrize("mu", [None, 0.7])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shift": 3.0},
        {"shift": 3.0, "shift_terminal": 0.02},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "shift": 3.0, "shift_terminal": 0.02},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    ],
    ids=str,
)
def test_without_a_students_grid_mu_acts_exactly_where_the_stock_schedulers_acts(settings: dict, mu) -> None:
    stock = FlowMatchEulerDiscreteScheduler(**settings)
    ours = RdmScheduler.from_config(stock.config)
    if mu is None and settings.get("use_dynamic_shifting"):
        with pytest.raises(ValueError, match="use_dynamic_shifting needs mu; give it, or set use_dynamic_shifting to"):
            ours.set_timesteps(sigmas=[1.0, 0.4])
        return
    for sigmas in (even(4), [0.9, 0.5, 0.3], [1.0, 0.6, 0.0]):
        for each in (stock, ours):
            each.set_timesteps(sigmas=sigmas, mu=mu)
        assert torch.allclose(ours.sigmas, stock.sigmas, atol=1e-6)


@flows
@pytest.mark.parametrize("mu", [None, 0.7])
@pytest.mark.parametrize("teachers", [{"shift": 3.0}, {"use_dynamic_shifting": True}], ids=str)
def test_a_flow_student_at_any_number_of_steps_is_its_exported_stock_scheduler(
    student_steps: int, mu: float | None, teachers: dict
) -> None:
    ours, stock = flow_student(student_steps, **teachers)
    for steps in range(1 if student_steps == 1 else 2, 12):  # diffusers divides by zero at a student's single step
        for request in ({"sigmas": np.linspace(1.0, 1 / steps, steps)}, {"num_inference_steps": steps}):
            if student_steps == 1 and steps == 1 and "sigmas" not in request:
                continue
            for each in (stock, ours):
                each.set_timesteps(**request, mu=mu)
            assert torch.allclose(ours.timesteps, stock.timesteps, atol=1e-3)
            assert torch.allclose(ours.sigmas, stock.sigmas, atol=1e-6)


@pytest.mark.parametrize("student_steps", range(1, 9))
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_another_student_at_any_number_of_steps_is_its_exported_stock_scheduler(student_steps: int, eta: float) -> None:
    family, teacher = FAMILIES["StableDiffusionPipeline"], RdmScheduler()
    stock = family.stock_scheduler(teacher, student_steps, eta)
    stock.set_timesteps(student_steps)
    ours = RdmScheduler(eta=eta, student_timesteps=stock.timesteps.tolist())
    for steps in range(1, 12):
        ours.set_timesteps(steps)
        if eta == 0 or steps <= student_steps:  # LCMScheduler takes no more than its original_inference_steps
            stock.set_timesteps(steps)
            assert ours.timesteps.tolist() == stock.timesteps.tolist()


def test_a_users_own_sigmas_of_the_students_number_are_honoured() -> None:
    ours, _ = flow_student(4, shift=3.0)
    own = [1.0, 0.9, 0.75, 0.5]
    ours.set_timesteps(sigmas=own, mu=0.7)
    assert torch.allclose(ours.sigmas, torch.tensor([*own, 0]))
    ours.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=0.7)  # as stock pipelines do where nobody asks for others
    assert torch.allclose(ours.sigmas, torch.tensor([*even(4), 0]))


def test_a_users_own_timesteps_of_the_students_number_are_honoured() -> None:
    ours = RdmScheduler(student_timesteps=[999, 749, 499, 249])
    ours.set_timesteps(timesteps=[999, 800, 600, 100])
    assert ours.timesteps.tolist() == [999, 800, 600, 100]
    flow, _ = flow_student(4)
    flow.set_timesteps(timesteps=[1000.0, 900.0, 750.0, 500.0])
    assert torch.allclose(flow.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


@pytest.mark.parametrize("timesteps", [[999, 499], [999, 749, 499, 249]])
def test_a_number_beside_timesteps_is_refused_as_lcm_refuses_it(timesteps: list[int]) -> None:
    for scheduler in (LCMScheduler(), RdmScheduler()):
        with pytest.raises(ValueError):
            scheduler.set_timesteps(4, timesteps=timesteps)


@pytest.mark.parametrize("kind", ["sigmas", "timesteps"])
def test_a_number_beside_a_flow_grid_of_another_length_is_refused(kind: str) -> None:
    grid = [1.0, 0.5] if kind == "sigmas" else [1000.0, 500.0]
    with pytest.raises(ValueError, match="num_inference_steps is 4, and a grid of 2 steps is given; give one of"):
        RdmScheduler(**FLOW).set_timesteps(4, **{kind: grid})
    RdmScheduler(**FLOW).set_timesteps(2, **{kind: grid})


def test_requests_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="Both timesteps and sigmas are given; give one of them"):
        RdmScheduler(**FLOW).set_timesteps(timesteps=[1000, 500], sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="sigmas are for flow matching, which this student does not use; give"):
        RdmScheduler().set_timesteps(sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="must consist of whole timesteps"):
        RdmScheduler().set_timesteps(timesteps=[999, 499.5])
    for grid in ([float("nan")], [1.0, float("nan")], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="must descend strictly and lie between 0 and 1000"):
            RdmScheduler(**FLOW).set_timesteps(sigmas=grid)
    with pytest.raises(ValueError, match="time_shift_type is 'cubic'; use exponential or linear"):
        RdmScheduler(**FLOW, time_shift_type="cubic")


@pytest.mark.parametrize("settings", [{"shift": 3.0}, {"use_dynamic_shifting": True, "shift_terminal": 0.02}], ids=str)
def test_flow_settings_survive_saving(settings: dict, tmp_path: Path) -> None:
    RdmScheduler.from_config(FlowMatchEulerDiscreteScheduler(**settings).config).save_pretrained(tmp_path)
    again = RdmScheduler.from_pretrained(tmp_path)
    assert settings.items() <= dict(again.config).items() and again.schedule.is_flow
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "RdmScheduler"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_a_pipeline_may_begin_midway(prediction_type: str) -> None:
    scheduler, sample = RdmScheduler(prediction_type=prediction_type, eta=0.5), torch.randn(SHAPE)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    assert scheduler.begin_index == 2
    for t in scheduler.timesteps[2:]:
        sample = scheduler.step(torch.tanh(sample), t, sample).prev_sample
    assert scheduler.step_index == 4 and sample.isfinite().all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_noise_is_added_at_arrays_of_times(prediction_type: str, make) -> None:
    scheduler, x0, noise = RdmScheduler(prediction_type=prediction_type), torch.randn(SHAPE), torch.randn(SHAPE)
    together = scheduler.add_noise(x0, noise, make([10, 500, 999]))
    assert torch.equal(together, scheduler.scale_noise(x0, make([10, 500, 999]), noise))
    for i, t in enumerate((10, 500, 999)):
        assert torch.equal(scheduler.add_noise(x0[i : i + 1], noise[i : i + 1], t), together[i : i + 1])
    assert scheduler.add_noise(x0.half(), noise.half(), make([10, 500, 999])).dtype == torch.float16


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_loop_keeps_its_dtype(prediction_type: str, dtype: torch.dtype) -> None:
    scheduler, sample = RdmScheduler(prediction_type=prediction_type), torch.randn(SHAPE).to(dtype)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        sample = scheduler.step(torch.tanh(sample), t, sample).prev_sample
        assert sample.dtype == dtype and sample.isfinite().all()
