"""The two updates of a step: micro-batches do not matter, nothing random is hidden, what is not finite stops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parts import make_run, randomise_adapters, relative_error, run_arguments
from torch import Tensor

from rdm_diffusers.networks import FAKE_SCORE, STUDENT, TEACHER
from rdm_diffusers.training.updates import NonFiniteError, collect, fake_score_update, student_update


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run of this test."""
    return lambda **changes: run_arguments(teacher_folder, prompts_file, tmp_path, **changes)


def gradients(argv: list[str], fresh: bool = False) -> dict[str, list[Tensor]]:
    """Both roles' gradients in a run's first update, with fresh adapters or with some that do something."""
    it = make_run(argv)
    if not fresh:
        randomise_adapters(it.networks)
    batch = collect(it.run, 0)
    student_update(it.run, batch)
    fake_score_update(it.run, batch, 0)
    return {role: [p.grad for p in it.networks.parameters(role)] for role in (STUDENT, FAKE_SCORE)}


@pytest.mark.parametrize("options", [{}, {"algorithm": "dmd"}, {"steps_per_rollout": 2}], ids=str)
def test_eight_samples_at_once_are_one_sample_eight_times(argv, options: dict) -> None:
    at_once = gradients(argv(train_batch_size=8, **options))
    one_by_one = gradients(argv(train_batch_size=1, gradient_accumulation_steps=8, **options))
    for role in (STUDENT, FAKE_SCORE):
        assert relative_error(one_by_one[role], at_once[role]) < 1e-5


def test_folding_the_adapters_does_not_change_an_updates_gradients(argv) -> None:
    layered, folded = gradients(argv()), gradients([*argv(), "--fold_adapters"])
    for role in (STUDENT, FAKE_SCORE):
        assert relative_error(folded[role], layered[role]) < 1e-4


def test_gradient_checkpointing_does_not_change_an_updates_gradients(argv) -> None:
    plain, checkpointed = gradients(argv()), gradients(argv(gradient_checkpointing=True))
    for role in (STUDENT, FAKE_SCORE):
        assert relative_error(checkpointed[role], plain[role]) < 1e-5


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
    alone = [group for update in range(6) for group in it.run.groups(update)]
    assert alone == list(range(24))
    shares = []
    for process in (0, 1):
        object.__setattr__(it.run, "process_index", process)
        object.__setattr__(it.run, "num_processes", 2)
        shares += [group for update in range(3) for group in it.run.groups(update)]
    assert sorted(shares) == list(range(24))


def test_every_prompt_is_used_once_an_epoch_in_a_new_order(argv) -> None:
    prompts = make_run(argv()).run.prompts
    epochs = [[prompts.index(epoch * 5 + i) for i in range(5)] for epoch in range(4)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_group_is_one_prompt_at_one_step_with_noises_of_its_own(argv) -> None:
    it = make_run(argv(steps_per_rollout=2, train_batch_size=16))
    batch = collect(it.run, 0)
    assert len(batch.samples) == 16
    for first in range(0, 16, 4):
        group = batch.samples[first : first + 4]
        embeds = group.conditioning.tensors["prompt_embeds"]
        assert (embeds == embeds[0]).all()
        assert (group.step == group.step[0]).all()
        assert (group.t == group.t[0]).all()
        assert torch.cdist(group.x_t.flatten(1), group.x_t.flatten(1)).fill_diagonal_(torch.inf).min() > 1
    assert batch.prompts[0] == batch.prompts[1] != batch.prompts[2]


def poison(networks, role: str, sample: int) -> None:
    """Makes one sample of a role's next predictions infinite."""
    healthy = networks.predict

    def predict(asked: str, *inputs) -> Tensor:
        x0 = healthy(asked, *inputs)
        if asked == role:
            x0 = x0 + torch.zeros_like(x0).index_fill(0, torch.tensor([sample]), torch.inf)
        return x0

    networks.predict = predict


@pytest.mark.parametrize("role", [TEACHER, FAKE_SCORE])
def test_a_direction_that_is_not_finite_names_term_prompt_and_step_and_touches_no_gradient(argv, role: str) -> None:
    it = make_run(argv())
    batch = collect(it.run, 0)
    poison(it.networks, role, sample=6)
    where = f"for prompt {batch.prompts[1]!r}, student step {int(batch.samples.step[6]) + 1}"
    with pytest.raises(NonFiniteError) as caught:
        student_update(it.run, batch)
    assert f"The student direction is not finite {where}" in str(caught.value)
    assert all(p.grad is None for role in (STUDENT, FAKE_SCORE) for p in it.networks.parameters(role))


def test_a_fake_score_loss_that_is_not_finite_names_term_prompt_and_step(argv) -> None:
    it = make_run(argv(train_batch_size=2, gradient_accumulation_steps=4))
    batch = collect(it.run, 0)
    batch.samples.x0[5] = torch.nan
    where = f"for prompt {batch.prompts[1]!r}, student step {int(batch.samples.step[5]) + 1}"
    with pytest.raises(NonFiniteError) as caught:
        fake_score_update(it.run, batch, 0)
    assert f"The fake score loss is not finite {where}" in str(caught.value)


def test_the_health_numbers_are_finite_and_the_correction_has_a_share(argv) -> None:
    it = make_run(argv())
    randomise_adapters(it.networks)
    batch = collect(it.run, 0)
    health = student_update(it.run, batch) | fake_score_update(it.run, batch, 0)
    assert {"reward_over_distance", "correction_over_reward", "log_ratio", "fake_loss"} <= health.keys()
    assert all(value.ndim == 0 and value.isfinite() for value in health.values())
    assert health["correction_over_reward"] > 0
