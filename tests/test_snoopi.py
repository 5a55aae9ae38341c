"""SNOOPI's random guidance: the teacher has another scale for every sample, and nothing else changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parts import make_conditioning, make_run, make_shared, randomise_adapters, relative_error, run_arguments
from parts_float64 import ROUNDING, in_float64
from test_matching import Product, make_samples
from test_resume import assert_resuming_changes_nothing
from test_updates import gradients, student_gradients

from rdm_diffusers.config import RunConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.distillation import GNDM, RunningMeans, ascent, estimate_reward, guidance_times
from rdm_diffusers.networks import FAKE_SCORE, STUDENT, TEACHER
from rdm_diffusers.prediction import expand
from rdm_diffusers.training.batches import collect
from rdm_diffusers.training.updates import student_update

SCALES = torch.tensor([1.0, 1.5, 3.0, 7.5])
SNOOPI = dict(algorithm="snoopi", guidance_scale=3.0)


@pytest.fixture
def float64() -> Iterator[None]:
    with in_float64():
        yield


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run of this test."""
    return lambda name="run", **changes: run_arguments(teacher_folder, prompts_file, tmp_path / name, **changes)


@pytest.mark.usefixtures("float64")
def test_the_teacher_is_guided_at_each_samples_own_scale_within_the_interval() -> None:
    networks, conditioning = make_shared(guidance_scale=5.0), make_conditioning(4)
    t, x_t = torch.tensor([100, 600, 700, 999]), torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        c = networks.predict(TEACHER, x_t, t, conditioning, guided=False)
        u = networks.predict(TEACHER, x_t, t, networks.null_conditioning.expand(4), guided=False)
        everywhere = networks.predict(TEACHER, x_t, t, conditioning, guidance_scale=SCALES)
        added = networks.guidance(x_t, t, conditioning, SCALES)
        networks.guidance_interval = (0.5, 0.8)
        within = networks.predict(TEACHER, x_t, t, conditioning, guidance_scale=SCALES)
    w = expand(SCALES, c)
    assert relative_error(everywhere, u + w * (c - u)) < ROUNDING
    assert relative_error(added, (w - 1) * (c - u)) < ROUNDING
    assert relative_error(within, u + w.where(expand((t > 500) & (t < 800), w), 1.0) * (c - u)) < ROUNDING


@pytest.mark.usefixtures("float64")
def test_a_member_pulls_through_the_teacher_at_each_samples_scale() -> None:
    networks, (samples, tau, noise) = make_shared(guidance_scale=5.0), make_samples()
    scales = SCALES.repeat(2)
    estimate = estimate_reward(networks, samples, tau, noise, guidance_scale=scales)
    found = ascent(networks, samples, estimate, Product().pull(estimate), micro_batch_size=3)
    parts = []
    for i, scale in enumerate(scales.tolist()):
        one = slice(i, i + 1)
        networks.guidance_scale = scale
        alone = estimate_reward(networks, samples[one], tau[one], noise[one])
        parts.append(ascent(networks, samples[one], alone, Product().pull(alone)))
    assert relative_error(found, torch.cat(parts)) < ROUNDING


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("decoupled", [None, True], ids=["at_tau", "decoupled"])
def test_every_re_noised_copy_has_a_scale_of_its_own_by_a_named_draw(
    decoupled: bool | None, argv, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = make_run(argv(**SNOOPI, guidance_range=[1.5, 6.0], num_renoisings=2, decoupled_guidance=decoupled))
    run, estimates = it.distillation, []
    advantage = GNDM.advantage
    monkeypatch.setattr(GNDM, "advantage", lambda self, e, s: (estimates.append(e), advantage(self, e, s))[1])
    batch = collect(run, 0)
    student_update(run, batch, RunningMeans())
    student_update(replace(run, guidance_range=()), batch, RunningMeans())  # w = 3 for all
    uniform = torch.cat([run.draws.uniform(f"guidance_scale/{n}", batch.keys) for n in (0, 1)])
    w = 1.5 + 4.5 * uniform
    drawn, usual = estimates
    assert torch.equal(drawn.guidance_scale, w)
    assert len(w.unique()) == 2 * len(batch.samples)
    samples, (x, t) = batch.samples.repeat(2), (usual.x_tau, usual.time)
    if decoupled:
        share, noise = (
            torch.cat([draw(n) for n in (0, 1)])
            for draw in (
                lambda n: run.draws.uniform(f"guidance/{n}", batch.keys),
                lambda n: run.draws.normal(f"guidance_noise/{n}", batch.keys, run.latent_shape),
            )
        )
        t = guidance_times(share, samples.t, run.networks.schedule)
        x = run.networks.schedule.add_noise(samples.x0, noise, t)
    with torch.no_grad():
        added = run.networks.guidance(x, t, samples.conditioning, torch.full_like(w, 2.0))  # c - u
    assert relative_error(drawn.teacher_x0 - usual.teacher_x0, expand(w - 3, added) * added) < ROUNDING
    assert torch.equal(drawn.fake_x0, usual.fake_x0)


@pytest.mark.usefixtures("float64")
def test_a_range_of_one_scale_is_that_scale(argv) -> None:
    it = make_run(argv(guidance_scale=3.0))
    randomise_adapters(it.networks)
    batch = collect(it.distillation, 0)
    usual = student_gradients(it.distillation, batch)
    same = student_gradients(replace(it.distillation, guidance_range=(3.0, 3.0)), batch)
    assert relative_error(same, usual) < ROUNDING
    other = student_gradients(replace(it.distillation, guidance_range=(1.0, 50.0)), batch)
    assert relative_error(other, usual) > 1e-3


@pytest.mark.usefixtures("float64")
def test_eight_samples_at_once_are_one_sample_eight_times(argv) -> None:
    at_once = gradients(argv(train_batch_size=8, **SNOOPI))
    one_by_one = gradients(argv(train_batch_size=1, gradient_accumulation_steps=8, **SNOOPI))
    for role in (STUDENT, FAKE_SCORE):
        assert relative_error(one_by_one[role], at_once[role]) < ROUNDING


def test_resuming_changes_nothing(argv, tmp_path: Path) -> None:
    assert_resuming_changes_nothing(argv, tmp_path, [], num_renoisings=2, gndm_lambda=1.0, **SNOOPI)


def test_the_range_is_around_the_guidance_scale_by_default() -> None:
    usual = RunConfig.of(algorithm="snoopi", guidance_scale=7.0, teacher_target="score")
    assert usual.times.guidance_range == (4.0, 10.0)
    given = RunConfig.of(algorithm="snoopi", guidance_range=[2.0, 9.0], teacher_target="score")
    assert given.times.guidance_range == (2.0, 9.0)
    assert RunConfig.of(algorithm="gndm", teacher_target="score").times.guidance_range == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--algorithm snoopi", "--algorithm snoopi varies the guidance of the teacher's score: it needs"),
        ("--algorithm snoopi --teacher_target score --guidance_scale 1", "--algorithm snoopi varies the guidance"),
        ("--guidance_range 2 5", "--guidance_range is for --teacher_target score"),
        ("--teacher_target score --guidance_scale 1 --guidance_range 2 5", "--guidance_range would have no effect"),
        ("--teacher_target score --guidance_range 5 2", "--guidance_range is 5.0 2.0; give two numbers, the lower"),
        ("--teacher_target score --guidance_range 5", "--guidance_range is 5.0; give two numbers, the lower first"),
    ],
)
def test_random_guidance_of_no_effect_is_one_sentence(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_args(words.split())
    assert re.sub(r"\s+", " ", said) in re.sub(r"\s+", " ", capsys.readouterr().err)
