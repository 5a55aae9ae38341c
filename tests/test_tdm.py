"""Trajectory distribution matching, against autograd through the sampler and the re-noising in the paper's notation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from parts import (
    make_conditioning,
    make_estimate,
    make_run,
    make_shared,
    randomise_adapters,
    relative_error,
    run_arguments,
    train_only,
)
from parts_float64 import ROUNDING, in_float64
from parts_sd3 import TOKENS, make_sd3_pipeline
from safetensors.torch import load_file
from test_matching import Product
from test_resume import LORA, assert_resuming_changes_nothing
from test_updates import gradients
from torch import Tensor
from torch.distributions import Normal

from rdm_diffusers.config import RunConfig
from rdm_diffusers.distillation import (
    GNDM,
    FreshNoise,
    NextState,
    RunningMeans,
    Samples,
    TimeDistribution,
    TrajectoryKL,
    ascent,
    estimate_reward,
    fake_score_bias,
)
from rdm_diffusers.distillation.times import times_between
from rdm_diffusers.networks import FAKE_SCORE, STUDENT, TEACHER
from rdm_diffusers.prediction import NoiseSchedule, expand
from rdm_diffusers.schedulers import RdmScheduler
from rdm_diffusers.training.batches import collect
from rdm_diffusers.training.updates import fake_score_update, student_update

GRIDS: dict[str, dict] = {
    "vp": dict(prediction_type="epsilon", student_timesteps=[999, 749, 499, 249]),
    "vp_uneven": dict(prediction_type="epsilon", student_timesteps=[900, 850, 300]),
    "vp_one_step": dict(prediction_type="epsilon", student_timesteps=[999]),
    "flow": dict(prediction_type="flow_prediction", student_sigmas=[1.0, 0.75, 0.5, 0.25]),
    "flow_shifted": dict(prediction_type="flow_prediction", student_sigmas=[1.0, 0.9, 0.75, 0.5]),
}
UNIFORM, COUNT = TimeDistribution(), 12
DISTRIBUTIONS = [UNIFORM, TimeDistribution("logit_normal", 0.5, 0.7), TimeDistribution("shifted", shift=3.0)]
EVEN = torch.cat([torch.arange(20_000) / 20_000, torch.tensor([1 - 2**-24])])


@pytest.fixture
def float64() -> Iterator[None]:
    with in_float64():
        yield


def make_renoising(grid: str, eta: float = 0.0, above: bool = False) -> NextState:
    scheduler = RdmScheduler(eta=eta, **GRIDS[grid])
    return NextState(scheduler.schedule, scheduler, above)


def make_samples(renoising: NextState, count: int = COUNT, steps: list[int] | None = None) -> Samples:
    """States of the renoising's grid, its steps in turn, always the same."""
    grid, generator = renoising.scheduler.timesteps, torch.Generator().manual_seed(5)
    step = torch.tensor(steps or [k % len(grid) for k in range(count)])
    x_t, x0 = (torch.randn(len(step), 4, 8, 8, generator=generator) for _ in range(2))
    return Samples(x_t, grid[step], x0, step, make_conditioning(len(step)))


def draw(samples: Samples) -> tuple[Tensor, Tensor]:
    """Uniform numbers and noises for samples."""
    generator = torch.Generator().manual_seed(6)
    return torch.rand(len(samples), generator=generator), torch.randn(samples.x0.shape, generator=generator)


def next_states(renoising: NextState, x0: Tensor, samples: Samples) -> Tensor:
    """x_{t_i}: where a deterministic sampler goes from each state with the predictions x0; with their graph."""
    scheduler = renoising.scheduler
    return scheduler.transition(x0, samples.x_t, samples.t, scheduler.previous_timestep(samples.t), 0.0)[0]


def next_scales(renoising: NextState, samples: Samples) -> tuple[Tensor, Tensor]:
    """alpha and sigma at each sample's next time `[M]`; 1 and 0 after the last step."""
    t, schedule = renoising.scheduler.previous_timestep(samples.t), renoising.schedule
    alpha, sigma = schedule.alpha(t.clamp(min=0)), schedule.sigma(t.clamp(min=0))
    return alpha.where(t >= 0, 1.0), sigma.where(t >= 0, 0.0)


def diffused(renoising: NextState, x0: Tensor, samples: Samples, tau: Tensor, noise: Tensor) -> Tensor:
    """x_tau ~ q(x_tau | x_{t_i}), by the paper: alpha_tau / alpha_{t_i} x_{t_i} and the noise that lacks."""
    (alpha, sigma), schedule = next_scales(renoising, samples), renoising.schedule
    ratio = schedule.alpha(tau) / alpha
    lacking = (schedule.sigma(tau) ** 2 - (ratio * sigma) ** 2).clamp(min=0).sqrt()
    return expand(ratio, x0) * next_states(renoising, x0, samples) + expand(lacking, x0) * noise


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("above", [False, True], ids=["interval", "above"])
@pytest.mark.parametrize("grid", GRIDS)
def test_x_tau_is_the_next_state_diffused_and_moves_with_the_prediction_as_autograd_says(
    grid: str, above: bool
) -> None:
    renoising = make_renoising(grid, above=above)
    samples = make_samples(renoising)
    uniform, noise = draw(samples)
    tau = renoising.times(uniform, samples, UNIFORM)
    renoised = renoising.renoise(samples, tau, noise)
    x0 = samples.x0.clone().requires_grad_()
    x_tau = diffused(renoising, x0, samples, tau, noise)
    assert relative_error(renoised.x_tau, x_tau.detach()) < ROUNDING
    (slope,) = torch.autograd.grad(x_tau.sum(), x0)
    assert relative_error(renoising.schedule.alpha(tau) * renoised.reach, slope[:, 0, 0, 0]) < ROUNDING
    assert (renoised.reach > 0).all() and (renoised.reach <= 1).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("grid", ["vp", "flow"])
def test_a_stochastic_sampler_and_the_last_step_re_noise_as_dmd_does(grid: str) -> None:
    stochastic, deterministic = make_renoising(grid, eta=1.0), make_renoising(grid)
    last = [3] * COUNT
    for renoising, samples in (
        (stochastic, make_samples(stochastic)),
        (deterministic, make_samples(deterministic, steps=last)),
    ):
        uniform, noise = draw(samples)
        tau = renoising.times(uniform, samples, UNIFORM)
        found, usual = (each.renoise(samples, tau, noise) for each in (renoising, FreshNoise(renoising.schedule)))
        assert relative_error(found.x_tau, usual.x_tau) < ROUNDING
        assert relative_error(found.reach, torch.ones(COUNT)) < ROUNDING
        assert relative_error(found.weight, torch.ones(COUNT)) < ROUNDING


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("grid", GRIDS)
def test_the_noise_level_of_x_tau_is_that_of_tau_exactly(grid: str) -> None:
    """x_tau is linear in x̂, the state's noise and the fresh noise; the last two's shares make up sigma."""
    renoising = make_renoising(grid)
    samples = make_samples(renoising)
    tau = renoising.times(draw(samples)[0], samples, UNIFORM)
    zero, one = torch.zeros_like(samples.x0), torch.ones_like(samples.x0)
    sigma_t = renoising.schedule.scales(samples.t, one)[1]
    still = replace(samples, x0=zero, x_t=zero)  # no prediction and no noise in the state
    own = renoising.renoise(replace(still, x_t=sigma_t * one), tau, zero).x_tau[:, 0, 0, 0]
    fresh = renoising.renoise(still, tau, one).x_tau[:, 0, 0, 0]
    assert relative_error((own**2 + fresh**2).sqrt(), renoising.schedule.sigma(tau)) < ROUNDING


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda each: each.name)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_intervals_are_disjoint_and_cover_all_times_of_the_grid(grid: str, distribution: TimeDistribution) -> None:
    renoising = make_renoising(grid)
    schedule, times = renoising.schedule, renoising.scheduler.timesteps.tolist()
    ends = [min(times[0], 980), *times[1:], 20]
    for k, (high, low) in enumerate(pairwise(ends)):
        t, step = torch.full((len(EVEN),), times[k]), torch.full((len(EVEN),), k)
        samples = Samples(torch.zeros(len(EVEN), 1), t, torch.zeros(len(EVEN), 1), step, make_conditioning(1))
        for tau in (
            renoising.times(EVEN, samples, distribution),
            renoising.learning_times(EVEN, samples, distribution),
        ):
            assert low <= tau.min() and (tau.max() <= high if schedule.is_flow else tau.max() < high)
            assert tau.min() < low + 2 and tau.max() >= high - 2  # it covers the interval, and the next one begins here
        above = replace(renoising, above=True).times(EVEN, samples, distribution)
        assert low <= above.min() < low + 2 and 978 <= above.max() <= 980
    assert schedule.is_flow == tau.is_floating_point()


@pytest.mark.parametrize("times", [[999, 990, 5], [995, 985], [10]])
def test_steps_beyond_the_range_of_times_keep_to_their_own(times: list[int]) -> None:
    scheduler = RdmScheduler(eta=0.0, student_timesteps=times)
    renoising = NextState(scheduler.schedule, scheduler)
    samples = make_samples(renoising, len(times))
    uniform, noise = draw(samples)
    tau, following = renoising.times(uniform, samples, UNIFORM), torch.tensor([*times[1:], 0])
    assert (tau >= following).all() and (tau <= samples.t).all()
    assert renoising.renoise(samples, tau, noise).x_tau.isfinite().all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda each: each.name)
def test_times_between_are_the_distributions_own_cut_off(distribution: TimeDistribution) -> None:
    low, high = 250.0, 700.0
    whole = 1000 * distribution.shares(EVEN)
    inside = whole[(whole >= low) & (whole < high)]
    ends = (torch.full_like(EVEN, end) for end in (low, high))
    found = times_between(EVEN, *ends, NoiseSchedule(None), distribution)
    for share in (0.1, 0.5, 0.9):
        assert torch.quantile(found, share).item() == pytest.approx(torch.quantile(inside, share).item(), abs=0.5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("grid", ["vp", "flow"])
def test_the_importance_weight_is_the_ratio_of_densities_for_each_dimension(grid: str) -> None:
    """N(x_tau; a x̂, s^2) against q(x_tau | x_{t_i}), to the power of 1 / d, without the constant."""
    renoising = make_renoising(grid)
    samples = make_samples(renoising)
    uniform, noise = draw(samples)
    tau = renoising.times(uniform, samples, UNIFORM)
    renoised = renoising.renoise(samples, tau, noise)
    a, s = renoising.schedule.scales(tau, noise)
    wanted = Normal(a * samples.x0, s).log_prob(renoised.x_tau) + s.log()
    drawn = Normal(0.0, 1.0).log_prob(noise)
    assert relative_error(renoised.weight.log(), (wanted - drawn).flatten(1).mean(1)) < ROUNDING
    assert renoised.weight.std() > 0.01


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("grid", ["vp", "flow"])
def test_the_pull_is_the_gradient_of_the_papers_distance_through_the_sampler(grid: str) -> None:
    renoising = make_renoising(grid)
    samples = make_samples(renoising)
    uniform, noise = draw(samples)
    tau = renoising.times(uniform, samples, UNIFORM)
    a, s = renoising.schedule.scales(tau, noise)
    x_tau = renoising.renoise(samples, tau, noise).x_tau
    real, fake = (torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    score_of_teacher, score_of_student = ((a * each - x_tau) / s**2 for each in (real, fake))
    x0 = samples.x0.clone().requires_grad_()
    state = next_states(renoising, x0, samples) / expand(
        next_scales(renoising, samples)[0], x0
    )  # x_{t_i} in units of a
    corrected = (state + s**2 / a * (score_of_teacher - score_of_student)).detach()
    d = noise[0].numel()
    c = 0.00054 * d**0.5
    loss = d**0.5 * (((state - corrected).flatten(1).square().sum(1) + c**2).sqrt() - c).sum()
    (gradient,) = torch.autograd.grad(loss, x0)
    estimate = make_estimate(samples.x0, real, fake, reach=renoising.reach(samples))
    objective = GNDM(matching=TrajectoryKL(), gndm_lambda=0.0, advantage_normalization="none")
    assert relative_error(objective.advantage(estimate, RunningMeans()).pull.x0, -gradient) < ROUNDING


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_what_a_member_pulls_through_the_networks_reaches_the_prediction_through_the_next_state(eta: float) -> None:
    renoising, networks = make_renoising("vp", eta), make_shared(guidance_scale=3.0)
    samples = make_samples(renoising, 4)
    uniform, noise = draw(samples)
    tau = renoising.times(uniform, samples, UNIFORM)
    estimate = estimate_reward(networks, samples, tau, noise, renoising=renoising)
    found = ascent(networks, samples, estimate, Product().pull(estimate), micro_batch_size=3)
    x0 = samples.x0.clone().requires_grad_()
    fresh = FreshNoise(renoising.schedule).schedule.add_noise(x0, noise, tau)
    x_tau = fresh if eta else diffused(renoising, x0, samples, tau, noise)
    with networks.acting_as(TEACHER):
        teacher = networks.predict(TEACHER, x_tau, tau, samples.conditioning)
    fake = networks.predict(FAKE_SCORE, x_tau, tau, samples.conditioning)
    with networks.acting_as(FAKE_SCORE):
        (gradient,) = torch.autograd.grad(((teacher - fake) * (fake - x0)).sum(), x0)
    assert relative_error(found, -gradient) < ROUNDING


@pytest.mark.usefixtures("float64")
def test_the_correction_finds_a_shift_of_the_student_that_only_partly_reaches_x_tau() -> None:
    """An exact fake score of what the student made before it moved by `shift`, on states that stayed."""
    renoising, count, variance, shift = make_renoising("vp"), 4000, 0.3, 0.4
    samples = make_samples(renoising, steps=[1] * count)
    own = torch.randn(samples.x0.shape, generator=torch.Generator().manual_seed(8))
    a_t, s_t = renoising.schedule.scales(samples.t, own)
    before = variance**0.5 * samples.x0
    moved = replace(samples, x0=before + shift, x_t=a_t * before + s_t * own)
    uniform, noise = draw(samples)
    tau = renoising.times(uniform, samples, UNIFORM)
    renoised = renoising.renoise(moved, tau, noise)
    a, s = renoising.schedule.scales(tau, noise)
    fake = a * variance / (a**2 * variance + s**2) * renoised.x_tau
    estimate = make_estimate(
        moved.x0, fake, fake, alpha=a.flatten(), sigma=s.flatten(), reach=renoised.reach, step=samples.step
    )
    bias = fake_score_bias(estimate, count, "shift", variance)
    missed = (s**2 + (1 - expand(renoised.reach, s)) * a**2 * variance) / (a**2 * variance + s**2)
    assert relative_error(bias.mean((1, 2, 3)), -shift * missed.flatten()) < 0.01


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run of this test."""
    return lambda name="run", **changes: run_arguments(teacher_folder, prompts_file, tmp_path / name, **changes)


TDM = dict(algorithm="tdm", num_student_steps=4)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(gndm_lambda=0.5, steps_per_rollout=2, num_renoisings=2, decoupled_guidance=True, eta=1.0),
        dict(algorithm="gndm", renoising="above", eta=0.0, fake_time_distribution="logit_normal"),
    ],
    ids=["tdm", "corrected", "gndm_above"],
)
def test_eight_samples_at_once_are_one_sample_eight_times(argv, options: dict) -> None:
    at_once = gradients(argv(train_batch_size=8, **TDM | options))
    one_by_one = gradients(argv(train_batch_size=1, gradient_accumulation_steps=8, **TDM | options))
    for role in (STUDENT, FAKE_SCORE):
        assert relative_error(one_by_one[role], at_once[role]) < ROUNDING


@pytest.mark.usefixtures("float64")
def test_the_fake_score_learns_the_prediction_at_the_diffused_next_states_by_their_weights(argv) -> None:
    it = make_run(argv(**TDM))
    randomise_adapters(it.networks)
    run, networks = it.distillation, it.networks
    batch = collect(run, 0)
    samples = batch.samples
    t = run.renoising.learning_times(run.draws.uniform("fake_time/0", batch.keys), samples, UNIFORM)
    following = run.scheduler.previous_timestep(samples.t)
    assert (following <= t).all() and (t < samples.t).all()
    noise = run.draws.normal("fake_noise/0", batch.keys, run.latent_shape)
    x_t = diffused(run.renoising, samples.x0, samples, t, noise)
    a, s = networks.schedule.scales(t, noise)
    mixed = (x_t - a * samples.x0) / s
    weight = torch.exp(-mixed.square().flatten(1).mean(1) / 2) / torch.exp(-noise.square().flatten(1).mean(1) / 2)
    x0 = networks.predict(FAKE_SCORE, x_t, t, samples.conditioning)
    loss = (expand(weight, noise) / s**2 * (x0 - samples.x0).square()).mean()
    parameters = networks.parameters(FAKE_SCORE)
    with networks.acting_as(FAKE_SCORE):
        expected = torch.autograd.grad(loss, parameters)
    fake_score_update(run, batch, 0)
    assert relative_error([each.grad for each in parameters], list(expected)) < ROUNDING


@pytest.mark.usefixtures("float64")
def test_a_students_step_is_the_distance_of_its_next_state(argv, monkeypatch: pytest.MonkeyPatch) -> None:
    it = make_run(argv(**TDM, gndm_lambda=1.0))
    run, estimates = it.distillation, []
    advantage = GNDM.advantage
    monkeypatch.setattr(GNDM, "advantage", lambda self, e, s: (estimates.append(e), advantage(self, e, s))[1])
    batch = collect(run, 0)
    student_update(run, batch, RunningMeans())
    (estimate,) = estimates
    noise = run.draws.normal("tau_noise/0", batch.keys, run.latent_shape)
    x_tau = diffused(run.renoising, batch.samples.x0, batch.samples, estimate.time, noise)
    assert relative_error(estimate.x_tau, x_tau) < ROUNDING
    assert estimate.weight is not None and estimate.weight.std() > 0  # of the residuals, too


def test_resuming_changes_nothing(argv, tmp_path: Path) -> None:
    assert_resuming_changes_nothing(argv, tmp_path, ["--fake_score_steps"], reuse_rollouts=3, gndm_lambda=1.0, **TDM)


def test_a_flow_teachers_student_is_trained(prompts_file: Path, tmp_path: Path) -> None:
    make_sd3_pipeline(shift=3.0).save_pretrained(tmp_path / "flow")
    options = dict(max_sequence_length=TOKENS, student_grid="shifted", **TDM)
    train_only(run_arguments(tmp_path / "flow", prompts_file, tmp_path / "run", **options))
    weights = load_file(tmp_path / "run" / LORA)
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    assert json.loads((tmp_path / "run" / "rdm_config.json").read_text())["scheduler"]["eta"] == 0


def test_the_next_state_of_a_student_of_one_step_is_refused_but_for_tdm() -> None:
    with pytest.raises(ValueError, match="--renoising interval would have no effect on a student of one step"):
        RunConfig.of(renoising="interval", num_student_steps=1)
    assert RunConfig.of(algorithm="tdm", num_student_steps=1).times.renoising == "interval"


def test_the_algorithm_is_deterministic_and_matches_next_states_whatever_the_preset() -> None:
    usual = RunConfig.of(algorithm="tdm")
    assert (usual.method.eta, usual.times.renoising, usual.method.gndm_lambda) == (0.0, "interval", 0.0)
    corrected = RunConfig.of(algorithm="tdm", preset="gndm")
    assert (corrected.method.eta, corrected.times.renoising, corrected.method.gndm_lambda) == (0.0, "interval", 1.0)
    chosen = RunConfig.of(algorithm="tdm", eta=1.0, renoising="x0")
    assert (chosen.method.eta, chosen.times.renoising) == (1.0, "x0")
    assert (RunConfig.of().method.eta, RunConfig.of().times.renoising) == (1.0, "x0")
