"""A run may be as long as so many passes over the prompts, and its learning rates may follow its batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from parts import PROMPTS, make_run, run_arguments, train_run

from rdm_diffusers.config import RunConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.networks import FAKE_SCORE, STUDENT
from rdm_diffusers.training.epochs import rate_factor, updates_of, with_updates


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """The command line of a run with some flags changed."""
    return lambda **changes: run_arguments(teacher_folder, prompts_file, tmp_path / "student", **changes)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"reuse_rollouts": 2}, {"steps_per_rollout": 2}, {"gradient_accumulation_steps": 4}, {"num_train_epochs": 3}],
)
def test_the_updates_of_an_epoch_are_the_fewest_that_visit_every_prompt(argv, options: dict, processes: int) -> None:
    it = make_run(argv(**{"num_train_epochs": 1, "max_train_steps": None, **options}))
    assert len(PROMPTS) == 5
    config, run, epochs = it.config, it.distillation, it.config.optimisation.num_train_epochs
    updates = updates_of(config, len(PROMPTS), processes)
    object.__setattr__(run, "num_processes", processes)
    visits: list[Counter[int]] = []
    for rollouts in (updates // config.method.reuse_rollouts, updates // config.method.reuse_rollouts - 1):
        visits.append(Counter({index: 0 for index in range(5)}))
        for process in range(processes):
            object.__setattr__(run, "process_index", process)
            visits[-1].update(run.prompts.index(g) for number in range(rollouts) for g in run.groups(number))
    assert min(visits[0].values()) >= epochs > min(visits[1].values())


def test_a_run_of_epochs_trains_so_many_updates_and_says_so_in_its_records(argv) -> None:
    it = make_run(argv(num_train_epochs=2, max_train_steps=None))  # 5 prompts in groups of 4, 8 samples an update
    assert it.config.optimisation.max_train_steps == it.arguments["max_train_steps"] == 5
    assert train_run(it) == 0 and it.state.update == 5


def test_a_number_of_updates_overrides_the_epochs(argv) -> None:
    config = parse_args(argv(num_train_epochs=2, max_train_steps=7)).optimisation
    assert (config.max_train_steps, config.num_train_epochs) == (7, None)


def test_the_file_of_a_run_of_epochs_repeats_the_epochs_and_flags_go_before_it(argv, tmp_path: Path) -> None:
    run = with_updates(parse_args(argv(num_train_epochs=2, max_train_steps=None)), 5, 1)
    (tmp_path / "epochs.yaml").write_text(run.as_yaml())
    assert "max_train_steps" not in run.as_yaml()
    assert RunConfig.from_yaml(tmp_path / "epochs.yaml").optimisation.num_train_epochs == 2
    (tmp_path / "updates.yaml").write_text(parse_args(argv(max_train_steps=7)).as_yaml())
    again = parse_args(["--config", str(tmp_path / "updates.yaml"), "--num_train_epochs", "3"])
    assert again.optimisation.num_train_epochs == 3
    assert again.command is not None and "--max_train_steps" not in again.command


def test_a_scaled_learning_rate_is_that_of_the_whole_batch_for_both_roles(argv) -> None:
    options = dict(learning_rate=1e-4, fake_learning_rate=3e-4, train_batch_size=4, gradient_accumulation_steps=2)
    it = make_run(argv(scale_lr=True, **options))
    rates = {role: it.state.optimizers[role].optimizer.param_groups[0]["lr"] for role in (STUDENT, FAKE_SCORE)}
    assert rates == {STUDENT: pytest.approx(8e-4), FAKE_SCORE: pytest.approx(24e-4)}
    assert rate_factor(it.config, num_processes=3) == 24
    assert rate_factor(parse_args(argv(**options)), num_processes=3) == 1
