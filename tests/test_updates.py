"""The two updates of a step: micro-batches do not matter, nothing random is hidden, what is not finite stops."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parts import make_run, randomise_adapters, relative_error, run_arguments, train_run
from parts_float64 import ROUNDING
from torch import Tensor

from rdm_diffusers.distillation import Draws, RunningMeans
from rdm_diffusers.networks import FAKE_SCORE, STUDENT, TEACHER
from rdm_diffusers.training.batches import collect, reuse, weigh_samples
from rdm_diffusers.training.finite import NonFiniteError
from rdm_diffusers.training.loop import step
from rdm_diffusers.training.tracking import numbers_of
from rdm_diffusers.training.updates import fake_score_update, student_update


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run of this test."""
    return lambda **changes: run_arguments(teacher_folder, prompts_file, changes.pop("output_dir", tmp_path), **changes)


def gradients(argv: list[str], fresh: bool = False) -> dict[str, list[Tensor]]:
    """Both roles' gradients in a run's first update, with fresh adapters or with some that do something."""
    it = make_run(argv)
    if not fresh:
        randomise_adapters(it.networks)
    batch, _ = weigh_samples(it.distillation, collect(it.distillation, 0), it.state.statistics, 0)
    student_update(it.distillation, batch, it.state.statistics)
    fake_score_update(it.distillation, batch, 0)
    return {role: [p.grad for p in it.networks.parameters(role)] for role in (STUDENT, FAKE_SCORE)}


PICTURES = {"num_target_images": 45, "target_inference_steps": 2}
GNDMR = {"algorithm": "gndmr", "reward": ["tiny_bold", "tiny_prompt_black_box:2"]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"algorithm": "dmd"},
        {"steps_per_rollout": 2, "gndm_lambda": 0.5, "num_renoisings": 2},
        GNDMR,
        {**GNDMR, "reward_combination": "sum", "projection_guard": True},
        {"algorithm": "sid", "num_renoisings": 2},
        {"algorithm": "sim", "gndm_lambda": 1.0, "advantage_normalization": "group", "reward": ["tiny_bold"]},
        {"algorithm": "dmd2", **PICTURES, "reward": ["tiny_bold"]},
        {"algorithm": "f_distill", **PICTURES, "gndm_lambda": 1.0},
        {"algorithm": "uni_instruct", **PICTURES, "gen_cls_loss_weight": 0.1},
    ],
    ids=[
        "gndm",
        "dmd",
        "two_steps_twice_renoised",
        "gndmr",
        "gndmr_sum_guard",
        "sid",
        "sim_corrected_rewarded",
        "dmd2",
        "f_distill",
        "uni_instruct",
    ],
)
@pytest.mark.usefixtures("float64")
def test_eight_samples_at_once_are_one_sample_eight_times(argv, options: dict) -> None:
    at_once = gradients(argv(train_batch_size=8, **options))
    one_by_one = gradients(argv(train_batch_size=1, gradient_accumulation_steps=8, **options))
    for role in (STUDENT, FAKE_SCORE):
        assert relative_error(one_by_one[role], at_once[role]) < ROUNDING


@pytest.mark.usefixtures("float64")
def test_folding_the_adapters_does_not_change_an_updates_gradients(argv) -> None:
    layered, folded = gradients(argv()), gradients([*argv(), "--fold_adapters"])
    for role in (STUDENT, FAKE_SCORE):
        assert relative_error(folded[role], layered[role]) < ROUNDING


@pytest.mark.usefixtures("float64")
def test_gradient_checkpointing_does_not_change_an_updates_gradients(argv) -> None:
    plain, checkpointed = gradients(argv()), gradients(argv(gradient_checkpointing=True))
    for role in (STUDENT, FAKE_SCORE):
        assert relative_error(checkpointed[role], plain[role]) < ROUNDING


def test_the_global_random_state_decides_nothing(argv) -> None:
    torch.manual_seed(1)
    one = gradients(argv(), fresh=True)
    torch.manual_seed(2)
    torch.randn(100)
    other = gradients(argv(), fresh=True)
    for role in (STUDENT, FAKE_SCORE):
        assert all(torch.equal(a, b) for a, b in zip(one[role], other[role], strict=True))


def test_the_seed_decides_the_numbers(argv) -> None:
    one, other = gradients(argv(seed=0)), gradients(argv(seed=1))
    assert relative_error(one[STUDENT], other[STUDENT]) > 0.1


def test_no_two_updates_or_processes_share_a_group(argv) -> None:
    it = make_run(argv(train_batch_size=8, group_size=2))
    alone = [group for update in range(6) for group in it.distillation.groups(update)]
    assert alone == list(range(24))
    shares = []
    for process in (0, 1):
        object.__setattr__(it.distillation, "process_index", process)
        object.__setattr__(it.distillation, "num_processes", 2)
        shares += [group for update in range(3) for group in it.distillation.groups(update)]
    assert sorted(shares) == list(range(24))


def test_every_prompt_is_used_once_an_epoch_in_a_new_order(argv) -> None:
    prompts = make_run(argv()).distillation.prompts
    epochs = [[prompts.index(epoch * 5 + i) for i in range(5)] for epoch in range(4)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_group_is_one_prompt_at_one_step_with_noises_of_its_own(argv) -> None:
    it = make_run(argv(steps_per_rollout=2, train_batch_size=16))
    batch = collect(it.distillation, 0)
    assert len(batch.samples) == 16
    for first in range(0, 16, 4):
        group = batch.samples[first : first + 4]
        embeds = group.conditioning.tensors["prompt_embeds"]
        assert (embeds == embeds[0]).all()
        assert (group.step == group.step[0]).all()
        assert (group.t == group.t[0]).all()
        assert torch.cdist(group.x_t.flatten(1), group.x_t.flatten(1)).fill_diagonal_(torch.inf).min() > 1
    assert batch.prompts[0] == batch.prompts[1] != batch.prompts[2]


def student_gradients(run, batch) -> list[Tensor]:
    """The student's gradients of one update, by themselves."""
    student_update(run, batch, RunningMeans())
    gradients = [parameter.grad for parameter in run.networks.parameters(STUDENT)]
    for parameter in run.networks.parameters(STUDENT):
        parameter.grad = None
    return gradients


@pytest.mark.usefixtures("float64")
def test_two_renoisings_are_the_average_of_two_estimates(argv) -> None:
    it = make_run(argv())
    randomise_adapters(it.networks)
    batch = collect(it.distillation, 0)
    both = student_gradients(replace(it.distillation, num_renoisings=2), batch)
    one, other = (student_gradients(it.distillation, replace(batch, visit=visit)) for visit in (0, 1))
    average = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
    assert relative_error(both, average) < ROUNDING
    assert relative_error(one, other) > 0.1


@pytest.mark.usefixtures("float64")
def test_a_rollout_for_another_update_keeps_its_states_and_predicts_them_anew(argv) -> None:
    it = make_run(argv(train_batch_size=3, gradient_accumulation_steps=8, steps_per_rollout=2, group_size=4))
    first = collect(it.distillation, 0)
    randomise_adapters(it.networks)  # the student changed
    second = reuse(it.distillation, first)
    with torch.no_grad():
        samples = first.samples
        x0 = it.distillation.student(samples.x_t, samples.t, samples.conditioning)
    assert relative_error(second.samples.x0, x0) < ROUNDING
    assert relative_error(second.samples.x0, first.samples.x0) > 0.01
    for name in ("x_t", "t", "step"):
        assert torch.equal(getattr(second.samples, name), getattr(samples, name))
    assert (first.visit, second.visit, second.log_ratio) == (0, 1, None)
    assert first.rollout is None  # its steps are only stored for importance weights


@pytest.mark.usefixtures("float64")
def test_importance_weights_multiply_the_directions_of_a_reused_rollout(argv) -> None:
    it = make_run(argv(reuse_rollouts=2, importance_weighting="clipped", num_student_steps=4))
    batch = next(
        b for b in (collect(it.distillation, n) for n in range(9)) if b.samples.step.unique().tolist() == [1, 2]
    )
    unchanged = reuse(it.distillation, batch)
    assert unchanged.log_ratio.abs().max() < ROUNDING
    plain = student_gradients(replace(it.distillation, importance_weighting="none"), replace(unchanged, log_ratio=None))
    assert relative_error(student_gradients(it.distillation, unchanged), plain) < ROUNDING
    randomise_adapters(it.networks)
    changed = reuse(it.distillation, batch)
    unweighted = reuse(replace(it.distillation, importance_weighting="none"), batch)
    assert relative_error(changed.samples.x0, unweighted.samples.x0) < ROUNDING
    assert changed.log_ratio.shape == (8,)
    assert changed.log_ratio.max() < -1  # never will it make these states again, so all weights are at their least
    plain = student_gradients(it.distillation, replace(changed, log_ratio=None))
    assert (
        relative_error(student_gradients(it.distillation, changed), [0.8 * gradient for gradient in plain]) < ROUNDING
    )
    health = student_update(it.distillation, changed, RunningMeans())
    assert {"effective_sample_size", "clip_fraction", "drift"} <= health.keys()
    assert health["clip_fraction"] == 1


class CountedDraws(Draws):
    """Keeps count of every random number that is drawn for a group."""

    def normal(self, purpose: str, groups, shape) -> Tensor:
        self.counts.update((purpose, group) for group in groups)
        return super().normal(purpose, groups, shape)

    def uniform(self, purpose: str, groups) -> Tensor:
        self.counts.update((purpose, group) for group in groups)
        return super().uniform(purpose, groups)


def test_no_random_number_of_a_run_is_used_twice(argv) -> None:
    options = {**GNDMR, "reuse_rollouts": 2, "checkpointing_steps": 4, "max_train_steps": 4, "num_renoisings": 2}
    it = make_run(argv(**options, steps_per_rollout=2))
    draws = CountedDraws(it.config.optimisation.seed, it.config.method.group_size)
    object.__setattr__(draws, "counts", Counter())
    it.distillation = replace(it.distillation, draws=draws)
    train_run(it)
    kinds = {purpose.split("/")[0] for purpose, _ in draws.counts}
    assert kinds == {"rollout_noise", "tau", "tau_noise", "fake_time", "fake_noise"}
    assert sorted({key for key, count in draws.counts.items() if count > 1}) == []


def poison(networks, role: str, sample: int) -> None:
    """Makes one sample of a role's next predictions infinite."""
    healthy = networks.predict

    def predict(asked: str, *inputs, **options) -> Tensor:
        x0 = healthy(asked, *inputs, **options)
        if asked == role:
            x0 = x0 + torch.zeros_like(x0).index_fill(0, torch.tensor([sample]), torch.inf)
        return x0

    networks.predict = predict


@pytest.mark.parametrize("role", [TEACHER, FAKE_SCORE])
def test_a_direction_that_is_not_finite_names_term_prompt_and_step_and_touches_no_parameter(argv, role: str) -> None:
    it = make_run(argv(num_renoisings=2))
    before = [parameter.detach().clone() for parameter in it.networks.parameters(STUDENT)]
    batch = collect(it.distillation, 0)
    poison(it.networks, role, sample=6)
    where = f"for prompt {batch.prompts[1]!r}, student step {int(batch.samples.step[6]) + 1}"
    student_update(it.distillation, batch, it.state.statistics)
    with pytest.raises(NonFiniteError) as caught:
        step(it.state, STUDENT, it.distillation.checks)
    assert f"The R_dm is not finite {where}" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, it.networks.parameters(STUDENT), strict=True))
    assert it.state.ema.optimization_step == 0


def test_a_fake_score_loss_that_is_not_finite_names_term_prompt_and_step(argv) -> None:
    it = make_run(argv(train_batch_size=2, gradient_accumulation_steps=4))
    batch = collect(it.distillation, 0)
    batch.samples.x0[5] = torch.nan
    where = f"for prompt {batch.prompts[1]!r}, student step {int(batch.samples.step[5]) + 1}"
    fake_score_update(it.distillation, batch, 0)
    with pytest.raises(NonFiniteError) as caught:
        step(it.state, FAKE_SCORE, it.distillation.checks)
    assert f"The fake score loss is not finite {where}" in str(caught.value)


@pytest.mark.usefixtures("float64")
def test_black_boxes_reweigh_the_fake_scores_loss_and_nothing_else_of_it(argv) -> None:
    it = make_run(argv(**GNDMR))
    batch, _ = weigh_samples(it.distillation, collect(it.distillation, 0), it.state.statistics, 0)
    assert batch.samples.weight is not None
    assert batch.samples.weight.std() > 0.05

    def of_weights(weight: Tensor | None) -> list[Tensor]:
        for parameter in it.networks.parameters(FAKE_SCORE):
            parameter.grad = None
        fake_score_update(it.distillation, replace(batch, samples=replace(batch.samples, weight=weight)), 0)
        return [parameter.grad.clone() for parameter in it.networks.parameters(FAKE_SCORE)]

    ones = torch.ones(len(batch.samples))
    plain, tripled, tilted = (of_weights(weight) for weight in (None, 3 * ones, batch.samples.weight))
    assert relative_error(tripled, [3 * g for g in plain]) < ROUNDING
    assert relative_error(tilted, plain) > 0.01


@pytest.mark.parametrize("options", [{}, GNDMR], ids=["gndm", "gndmr"])
def test_the_health_numbers_are_finite_and_the_correction_has_a_share(argv, options: dict) -> None:
    it = make_run(argv(steps_per_rollout=2, **options))
    randomise_adapters(it.networks)
    batch, health = weigh_samples(it.distillation, collect(it.distillation, 0), it.state.statistics, 0)
    health |= student_update(it.distillation, batch, it.state.statistics) | fake_score_update(it.distillation, batch, 0)
    assert {"reward_over_distance", "correction_over_reward", "log_ratio", "fake_loss", "contrast"} <= health.keys()
    assert all(value.ndim == 0 for value in health.values())
    assert all(math.isfinite(value) for value in numbers_of(health).values())
    assert health["correction_over_reward"] > 0
    if options:
        assert {"reward/tiny_bold", "reward/tiny_prompt_black_box", "reward_share_effective"} <= health.keys()
        assert 0.05 < health["reward_share_effective"] < 0.2 * 1.01


def test_the_contrast_is_that_of_the_students_last_step_and_unknown_where_a_batch_has_none(argv) -> None:
    it, seen = make_run(argv(train_batch_size=4)), {}
    for number in range(6):
        batch = collect(it.distillation, number)
        seen[int(batch.samples.step[0])] = student_update(it.distillation, batch, RunningMeans())["contrast"]
    assert not seen[0].isfinite()
    assert seen[1] > 0


def test_an_invalid_reward_neither_stops_a_run_nor_touches_its_samples(argv, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def bad(images, prompts):\n    return [float('nan')] * len(images)\n")
    rewarded = make_run(argv(algorithm="gndmr", reward=f"{tmp_path}/bad.py:bad", output_dir=tmp_path / "bad"))
    plain = make_run(argv())
    for it in (rewarded, plain):
        randomise_adapters(it.networks)
    one, other = (student_gradients(it.distillation, collect(it.distillation, 0)) for it in (rewarded, plain))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
