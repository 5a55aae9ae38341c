"""One step of RdmScheduler: its log-probability, times, generators, dtypes and errors."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from rdm_diffusers.schedulers import RdmScheduler

SHAPE = (3, 4, 8, 8)


def four_steps(**options) -> RdmScheduler:
    """A scheduler on [999, 749, 499, 249]."""
    scheduler = RdmScheduler(**options)
    scheduler.set_timesteps(4)
    return scheduler


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_log_prob_is_that_of_the_normal_distribution(eta: float, prediction_type: str) -> None:
    scheduler = four_steps(eta=eta, prediction_type=prediction_type)
    output, x_t, t = torch.randn(SHAPE), torch.randn(SHAPE), scheduler.timesteps[1]
    step = scheduler.step(output, t, x_t, generator(), return_log_prob=True)
    expected = Normal(step.mean.double(), step.std.double()).log_prob(step.prev_sample.double()).flatten(1).sum(1)
    assert step.log_prob.dtype == torch.float64
    assert torch.allclose(step.log_prob, expected, rtol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_a_true_x0_steps_to_a_sample_of_the_next_times_noise_of_which_eta_is_fresh(
    eta: float, prediction_type: str
) -> None:
    scheduler = four_steps(eta=eta, prediction_type=prediction_type)
    t, following = scheduler.timesteps[1:3]
    x0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    x_t = scheduler.schedule.add_noise(x0, noise, t)
    mean, std = scheduler.transition(x0, x_t, t, following)
    alpha, sigma = scheduler.schedule.alpha(following), scheduler.schedule.sigma(following)
    assert torch.allclose(std, eta * sigma)
    assert torch.allclose(mean, alpha * x0 + (1 - eta**2) ** 0.5 * sigma * noise, atol=1e-5)


def test_the_draw_has_the_stated_mean_and_standard_deviation() -> None:
    scheduler = four_steps(eta=0.6)
    output, x_t = torch.randn(1, 1, 1, 1).expand(1, 4, 100, 100), torch.ones(1, 4, 100, 100)
    step = scheduler.step(output, scheduler.timesteps[0], x_t, generator())
    deviation = step.prev_sample - step.mean
    assert abs(deviation.mean()) < 0.02 * step.std
    assert abs(deviation.std() / step.std - 1) < 0.02


def test_log_prob_of_the_same_output_on_the_stored_sample_is_that_of_the_draw() -> None:
    scheduler = four_steps()
    output, x_t, t = torch.randn(SHAPE), torch.randn(SHAPE), scheduler.timesteps[2]
    step = scheduler.step(output, t, x_t, generator(), return_log_prob=True)
    assert torch.equal(scheduler.log_prob(output, t, x_t, step.prev_sample), step.log_prob)


def test_log_prob_of_another_network_is_its_own_density_of_the_stored_sample_with_gradients() -> None:
    scheduler = four_steps(eta=0.7)
    x_t, t = torch.randn(SHAPE), scheduler.timesteps[1]
    drawn = scheduler.step(torch.randn(SHAPE), t, x_t, generator())
    other = torch.randn(SHAPE).requires_grad_()
    log_prob = scheduler.log_prob(other, t, x_t, drawn.prev_sample)
    theirs = scheduler.step(other, t, x_t, generator())
    expected = Normal(theirs.mean.double(), theirs.std.double()).log_prob(drawn.prev_sample.double())
    assert torch.allclose(log_prob, expected.flatten(1).sum(1), rtol=1e-12)
    assert torch.autograd.grad(log_prob.sum(), other)[0].abs().min() > 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_the_last_step_gives_x0_with_no_noise_and_log_prob_zero(prediction_type: str) -> None:
    scheduler = four_steps(prediction_type=prediction_type)
    step = scheduler.step(torch.randn(SHAPE), scheduler.timesteps[-1], torch.randn(SHAPE), return_log_prob=True)
    assert step.std == 0
    assert torch.equal(step.prev_sample, step.pred_original_sample)
    assert torch.equal(step.log_prob, torch.zeros(3, dtype=torch.float64))


def test_eta_zero_has_std_zero_and_log_prob_zero_at_every_step() -> None:
    scheduler = four_steps(eta=0.0)
    for t in scheduler.timesteps:
        step = scheduler.step(torch.randn(SHAPE), t, torch.randn(SHAPE), return_log_prob=True)
        assert step.std == 0
        assert torch.equal(step.log_prob, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("index", range(4))
def test_scalar_and_per_sample_times_give_the_same_numbers(index: int) -> None:
    scheduler = four_steps(eta=0.8)
    output, x_t, t = torch.randn(SHAPE), torch.randn(SHAPE), scheduler.timesteps[index]
    scalar = scheduler.step(output, t, x_t, generator(), return_log_prob=True)
    each = scheduler.step(output, t.expand(3), x_t, generator(), return_log_prob=True)
    assert torch.equal(scalar.prev_sample, each.prev_sample)
    assert torch.equal(scalar.mean, each.mean)
    assert torch.equal(scalar.log_prob, each.log_prob)


def test_samples_at_different_times_step_as_they_would_alone() -> None:
    scheduler = four_steps()
    output, x_t = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    together = scheduler.step(
        output, scheduler.timesteps, x_t, [torch.Generator().manual_seed(i) for i in range(4)], return_log_prob=True
    )
    for i, t in enumerate(scheduler.timesteps):
        one = slice(i, i + 1)
        alone = scheduler.step(output[one], t, x_t[one], torch.Generator().manual_seed(i), return_log_prob=True)
        assert torch.allclose(alone.prev_sample, together.prev_sample[one], atol=1e-6)
        assert torch.allclose(alone.log_prob, together.log_prob[one], rtol=1e-6)


def test_a_generator_per_sample_makes_each_sample_independent_of_its_batch() -> None:
    scheduler = four_steps()
    output, x_t, t = torch.randn(SHAPE), torch.randn(SHAPE), scheduler.timesteps[0]
    batch = scheduler.step(output, t, x_t, [torch.Generator().manual_seed(i) for i in range(3)]).prev_sample
    alone = scheduler.step(output[2:], t, x_t[2:], [torch.Generator().manual_seed(2)]).prev_sample
    assert torch.equal(batch[2:], alone)


def test_a_bfloat16_output_gives_a_bfloat16_sample_but_a_float32_mean() -> None:
    scheduler = four_steps()
    output, x_t = torch.randn(SHAPE).bfloat16(), torch.randn(SHAPE).bfloat16()
    step = scheduler.step(output, scheduler.timesteps[0], x_t, generator(), return_log_prob=True)
    assert step.prev_sample.dtype == step.pred_original_sample.dtype == torch.bfloat16
    assert step.mean.dtype == step.std.dtype == torch.float32
    assert step.log_prob.dtype == torch.float64


def test_the_tuple_is_the_sample_and_the_x0_prediction() -> None:
    scheduler = four_steps()
    output, x_t, t = torch.randn(SHAPE), torch.randn(SHAPE), scheduler.timesteps[0]
    named = scheduler.step(output, t, x_t, generator())
    plain = scheduler.step(output, t, x_t, generator(), return_dict=False)
    assert len(plain) == 2
    assert torch.equal(plain[0], named.prev_sample)
    assert torch.equal(plain[1], named.pred_original_sample)


def test_the_step_index_counts_the_steps_of_a_pipeline() -> None:
    scheduler = four_steps()
    assert scheduler.step_index is None
    for count, t in enumerate(scheduler.timesteps, start=1):
        scheduler.step(torch.randn(SHAPE), t, torch.randn(SHAPE))
        assert scheduler.step_index == count
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None


def test_previous_timestep_is_the_next_on_the_way_to_x0_and_minus_one_at_the_end() -> None:
    scheduler = four_steps()
    assert scheduler.previous_timestep(scheduler.timesteps).tolist() == [749, 499, 249, -1]


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_an_eta_outside_zero_to_one_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=r"eta is -?[0-9.]+; it must lie in \[0, 1\]"):
        RdmScheduler(eta=eta)


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type is 'noise'; use one of epsilon"):
        RdmScheduler(prediction_type="noise")


@pytest.mark.parametrize("grid", [[249, 499], [500, 500], [1000, 500], [999, -1]])
def test_a_grid_that_does_not_descend_within_the_range_is_refused(grid: list[int]) -> None:
    with pytest.raises(ValueError, match="must descend strictly and lie between 0 and 999"):
        RdmScheduler(student_timesteps=grid)
    with pytest.raises(ValueError, match="must descend strictly and lie between 0 and 999"):
        RdmScheduler().set_timesteps(timesteps=grid)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_out_of_range_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps}; it must lie between 1 and 1000"):
        RdmScheduler().set_timesteps(steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
@pytest.mark.parametrize("time", [1001, 501, 0, -1, torch.tensor([749, 748, 749])])
def test_a_step_from_a_time_off_the_grid_is_refused(prediction_type: str, time: int | torch.Tensor) -> None:
    scheduler, sample = four_steps(prediction_type=prediction_type), torch.randn(SHAPE)
    said = r"The time .* is not on the grid \[.*\]; call set_timesteps\."
    with pytest.raises(ValueError, match=said):
        scheduler.step(sample, time, sample)
    with pytest.raises(ValueError, match=said):
        scheduler.log_prob(sample, time, sample, sample)
    with pytest.raises(ValueError, match=said):
        scheduler.index_for_timestep(time)


def test_the_previous_timestep_of_any_time_is_the_grids_next_lower_one() -> None:
    times = torch.tensor([999, 998, 500, 499, 249, 1, 0])
    assert four_steps().previous_timestep(times).tolist() == [749, 749, 499, 249, -1, -1, -1]


def test_a_spacing_that_does_not_start_at_pure_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="timestep_spacing is 'leading'"):
        RdmScheduler(timestep_spacing="leading")
