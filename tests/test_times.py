"""Distributions of times, and guidance by noise level, against independent writings-out of their formulas."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from parts import make_conditioning, make_run, make_shared, relative_error, run_arguments, train_only
from parts_sd3 import TOKENS, make_sd3_pipeline
from test_updates import gradients

from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.distillation import TimeDistribution, denoising_times, guidance_times, renoising_times
from rdm_diffusers.networks import FAKE_SCORE, STUDENT, TEACHER
from rdm_diffusers.prediction import NoiseSchedule, expand, to_x0
from rdm_diffusers.training.batches import collect
from rdm_diffusers.training.updates import student_update

FLOW, VP = NoiseSchedule(None), NoiseSchedule(torch.linspace(0.999, 0.005, 1000))
EVEN = (torch.arange(100_000) + 0.5) / 100_000


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
def test_uniform_times_are_as_ever(schedule: NoiseSchedule) -> None:
    tau, t = 20 + EVEN * (980 - 20), EVEN * 1000
    expected = (tau, t.clamp(min=1)) if schedule.is_flow else (tau.long(), t.long())
    assert torch.equal(renoising_times(EVEN, schedule), expected[0])
    assert torch.equal(denoising_times(EVEN, schedule), expected[1])


def test_logit_normal_times_have_the_density_of_stable_diffusion_3() -> None:
    mean, std = 0.5, 0.7
    shares = TimeDistribution("logit_normal", mean, std).shares(EVEN)
    seen = torch.histc(shares, 50, 0, 1) * 50 / len(EVEN)
    u = (torch.arange(50) + 0.5) / 50
    gauss = torch.exp(-((torch.logit(u) - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
    assert torch.allclose(seen, gauss / (u * (1 - u)), atol=0.02)
    assert torch.quantile(shares[::10], 0.5).item() == pytest.approx(1 / (1 + math.exp(-mean)), abs=1e-3)


def test_shifted_times_are_those_of_the_stock_flow_scheduler() -> None:
    scheduler = make_sd3_pipeline(shift=3.0).scheduler  # its training timesteps are shifted already
    shares = TimeDistribution("shifted", shift=3.0).shares(torch.arange(1, 1001).flip(0) / 1001)
    assert torch.allclose(shares, scheduler.sigmas, atol=2e-3)


@pytest.mark.parametrize("name", ["logit_normal", "shifted"])
@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
def test_no_time_leaves_the_schedule_even_at_the_ends(name: str, schedule: NoiseSchedule) -> None:
    ends = torch.tensor([0.0, 1e-7, 0.5, 1 - 2**-24])
    distribution = TimeDistribution(name, 5.0, 20.0, 100.0)
    for times in (renoising_times(ends, schedule, distribution), denoising_times(ends, schedule, distribution)):
        assert times.isfinite().all() and (times >= 0).all() and (times < 1000).all() and (times.diff() >= 0).all()
        assert schedule.alpha(times).isfinite().all()


@pytest.mark.usefixtures("float64")
def test_the_teacher_is_guided_within_the_interval_alone() -> None:
    networks, conditioning = make_shared(guidance_scale=3.0), make_conditioning(4)
    t = torch.tensor([100, 200, 700, 999])
    networks.guidance_interval = (0.2, 0.7)
    x_t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        guided = networks.predict(TEACHER, x_t, t, conditioning)
        networks.guidance_scale = 1.0
        c = networks.predict(TEACHER, x_t, t, conditioning)
        u = networks.predict(TEACHER, x_t, t, networks.null_conditioning.expand(4))
    w = expand(torch.tensor([1.0, 3.0, 3.0, 1.0]), c)
    assert relative_error(guided, u + w * (c - u)) < 1e-9


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run of this test."""
    return lambda **changes: run_arguments(teacher_folder, prompts_file, tmp_path, **changes)


@pytest.mark.usefixtures("float64")
def test_decoupled_guidance_is_the_unguided_r_dm_and_guidance_at_less_noise(argv, monkeypatch) -> None:
    it = make_run(argv(decoupled_guidance=True, guidance_scale=3.0, steps_per_rollout=2))
    run, estimates = it.distillation, []
    batch = collect(run, 0)
    advantage = type(run.objective).advantage
    monkeypatch.setattr(
        type(run.objective), "advantage", lambda self, e, s: (estimates.append(e), advantage(self, e, s))[1]
    )
    student_update(run, batch, it.state.statistics)
    (estimate,), samples = estimates, batch.samples

    def x0(role: str, t: torch.Tensor, noise: str, conditioning) -> torch.Tensor:
        a, s = (each[:, None, None, None] for each in (run.networks.schedule.alpha(t), run.networks.schedule.sigma(t)))
        x_t = a * samples.x0 + s * run.draws.normal(noise, batch.keys, run.latent_shape)
        with torch.no_grad():
            output = run.networks._output(role, x_t, t, conditioning)
        return to_x0("epsilon", output, x_t, a, s)

    tau = (20 + run.draws.uniform("tau/0", batch.keys) * 960).long()
    tau_g = (20 + run.draws.uniform("guidance/0", batch.keys) * (samples.t.clamp(max=980) - 20)).long()
    assert (tau_g < samples.t).all() and (tau_g > tau).any()
    nothing = run.networks.null_conditioning.expand(len(samples))
    c, f = (x0(role, tau, "tau_noise/0", samples.conditioning) for role in (TEACHER, FAKE_SCORE))
    c_g, u_g = (x0(TEACHER, tau_g, "guidance_noise/0", each) for each in (samples.conditioning, nothing))
    assert relative_error(estimate.reward, (c - f) + 2.0 * (c_g - u_g)) < 1e-9
    assert it.networks.calls["teacher forward"] == (1 + 2 + 1 + 2) * len(samples)  # ours, then this test's


def test_guidance_times_are_uniform_below_the_students_own() -> None:
    t = torch.tensor([1000.0, 500.0, 10.0])
    assert guidance_times(torch.tensor([0.5, 0.5, 0.5]), t, FLOW).tolist() == pytest.approx([500.0, 260.0, 20.0])


@pytest.mark.parametrize(
    "flags",
    [
        {"renoising_time_distribution": "logit_normal", "logit_mean": 1.0},
        {"fake_time_distribution": "logit_normal", "logit_std": 0.5},
        {"guidance_interval": [0.3, 0.6]},
        {"decoupled_guidance": True},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_each_flag_changes_the_gradients_of_its_role_alone(flags: dict, argv) -> None:
    usual, changed = gradients(argv(gndm_lambda=0.0)), gradients(argv(gndm_lambda=0.0, **flags))
    role, other = (FAKE_SCORE, STUDENT) if "fake_time_distribution" in flags else (STUDENT, FAKE_SCORE)
    assert relative_error(changed[role], usual[role]) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(changed[other], usual[other], strict=True))


def test_a_flow_run_takes_its_teachers_shift(prompts_file: Path, tmp_path: Path) -> None:
    flags = dict(renoising_time_distribution="shifted", fake_time_distribution="shifted", max_sequence_length=TOKENS)
    for name, scheduler, shift in (
        ("static", {"shift": 3.0}, 3.0),
        ("dynamic", {"use_dynamic_shifting": True}, math.exp(0.5 + (16 - 256) * 0.65 / 3840)),
    ):
        make_sd3_pipeline(**scheduler).save_pretrained(tmp_path / name)
        run = make_run(run_arguments(tmp_path / name, prompts_file, tmp_path / f"{name}-run", **flags)).distillation
        assert run.renoising_distribution == run.fake_distribution
        assert (run.fake_distribution.name, run.fake_distribution.shift) == ("shifted", pytest.approx(shift))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--logit_mean 1", "--logit_mean would have no effect; leave it out, or add --renoising_time_distribution"),
        ("--guidance_interval .3", "--guidance_interval is 0.3; give two numbers, the lower first"),
        ("--guidance_interval .6 .3", "--guidance_interval is 0.6 0.3; give two numbers, the lower first"),
        (
            "--teacher_target score --guidance_interval .2 .8 --guidance_scale 1",
            "--guidance_interval would have no effect",
        ),
        ("--decoupled_guidance --teacher_target samples", "--decoupled_guidance is for --teacher_target score"),
        ("--guidance_interval .2 .8 --teacher_target samples", "--guidance_interval is for --teacher_target score"),
    ],
)
def test_a_flag_of_no_effect_is_one_sentence(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(words.split())
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["renoising_time_distribution", "fake_time_distribution"])
def test_the_shift_of_a_teacher_without_one_is_refused(name: str, argv) -> None:
    with pytest.raises((ValueError, SystemExit), match=re.escape(f"--{name} shifted would have no effect")):
        train_only(argv(**{name: "shifted"}))
