"""Metrics of the student while it trains: what they are, that they change nothing, and what follows from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from parts import make_run, read_state, run_arguments, train_only
from parts_kills import kills, make_state
from parts_processes import in_two_processes
from safetensors.torch import load_file

from rdm_diffusers.commands import export
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.config.record import command_line
from rdm_diffusers.config.validation import FEATURES
from rdm_diffusers.evaluation import features as feature_networks
from rdm_diffusers.evaluation.measuring import Measures, measure_files
from rdm_diffusers.evaluation.pictures import to_pil
from rdm_diffusers.frechet import FrechetReference
from rdm_diffusers.report.rows import append_row, read_rows, write_rows
from rdm_diffusers.rewards import load_reward
from rdm_diffusers.tiny.captions import CAPTIONS
from rdm_diffusers.training.best import is_better, values_without_gain
from rdm_diffusers.training.checkpoint_files import (
    find_checkpoint,
    list_checkpoints,
    read_record,
    set_newer_aside,
    tidy,
)
from rdm_diffusers.training.checkpoints import save_checkpoint
from rdm_diffusers.training.trainer import Trainer
from rdm_diffusers.training.validation_metrics import draw_measured, measure_images

LORA = "pytorch_lora_weights.safetensors"
COUNT = ["--num_validation_metric_images", "6"]
METRICS = ["--validation_metrics", "fd_to_teacher", "tiny_bold", "--reference_teacher", "tiny", *COUNT]
TINY_METRICS = ["--validation_metrics", "fd_to_teacher", "prompt_accuracy", "tiny_bold", *COUNT]
PRICES = """
import itertools, random, torch

VALUES = {values}
calls = itertools.count()

def price(images, prompts):
    "A number that the test has chosen for each validation; it also uses up random numbers."
    random.random(), torch.rand(1)
    return torch.full((len(images),), VALUES[next(calls)])
"""


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run into a named folder of this test."""

    def make(name: str, flags: list[str] = METRICS, **changes) -> list[str]:
        options = dict(validation_steps=1, steps_per_rollout=2, max_train_steps=3, num_validation_images=1)
        where = (changes.pop("teacher", teacher_folder), prompts_file, tmp_path / name)
        return [*run_arguments(*where, **{**options, **changes}), *flags]

    return make


@pytest.fixture
def priced(tmp_path: Path):
    """Flags of a metric `price` that has these values, one after the other."""

    def flags(values: list[float], *more: str) -> list[str]:
        file = tmp_path / f"prices-{len(list(tmp_path.glob('prices-*')))}.py"
        file.write_text(PRICES.format(values=values))
        spec = f"{file}:price"
        return [
            "--validation_metrics",
            spec,
            *COUNT,
            "--metric_for_best_model",
            spec,
            *more,
        ]

    return flags


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "validation" / "metrics.jsonl").read_text().splitlines()]


def test_metrics_do_not_change_the_training_by_a_bit(argv, priced, tmp_path: Path) -> None:
    own = tmp_path / "noisy.py"  # a training reward that uses the global random numbers
    own.write_text("import torch\ndef noisy(images, prompts):\n    return images.mean((1, 2, 3)) * torch.rand(1)\n")
    rewards = dict(algorithm="gndmr", reward=f"{own}:noisy", reuse_rollouts=3, checkpointing_steps=3)
    train_only(argv("without", [], **rewards))
    train_only(argv("with", [*METRICS, *priced([1.0] * 3)[:2]], **rewards))
    one, two = (load_file(tmp_path / name / LORA) for name in ("without", "with"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    states = [read_state(tmp_path / name / "checkpoint-3") for name in ("without", "with")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    health = [read_rows(tmp_path / name / "logs" / "health.jsonl") for name in ("without", "with")]
    assert [{n: v for n, v in row.items() if "/" in n and "network" in n} for row in health[0]] == [
        {n: v for n, v in row.items() if "/" in n and "network" in n} for row in health[1]
    ]


def test_metrics_are_those_of_rdm_evaluate_on_the_same_images(argv, tmp_path: Path) -> None:
    it = make_run(argv("student", TINY_METRICS, teacher="tiny"))
    metrics = it.metrics
    assert metrics is not None and metrics.conditioning is not None and metrics.features is not None
    images = draw_measured(it.distillation, it.teacher, metrics.conditioning, 6, it.accelerator)
    measured = measure_images(images, metrics, torch.device("cpu"))
    files = [tmp_path / f"{i}.png" for i in range(6)]
    for image, file in zip(images, files, strict=True):
        to_pil(image / 255).save(file)
    reference = feature_networks.load_reference("tiny", "teacher", metrics.features)
    reward = {"tiny_bold": load_reward("tiny_bold", "cpu")}
    expected = measure_files(
        files, metrics.prompts, Measures(metrics.features, {"teacher": reference}, reward), torch.device("cpu")
    )
    assert measured == {
        "fd_to_teacher": expected["fd_to_teacher"]["value"],
        "prompt_accuracy": expected["prompt_accuracy"],
        "tiny_bold": expected["rewards"]["tiny_bold"]["mean"],
    }
    assert metrics.prompts == list(CAPTIONS[::40])


def test_the_images_depend_on_no_other_image(argv) -> None:
    it = make_run(argv("student"))
    conditioning = it.metrics.conditioning
    images = draw_measured(it.distillation, it.teacher, conditioning, 6, it.accelerator)
    fewer = draw_measured(it.distillation, it.teacher, conditioning, 3, it.accelerator)
    assert images.shape == (6, 3, 32, 32) and images.dtype == torch.uint8
    assert (images[:3].int() - fewer.int()).abs().max() <= 1  # other batches round otherwise


def test_metrics_go_to_the_log_the_trackers_and_a_file(argv, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train_only(argv("student", report_to="tensorboard", logging_steps=1))
    rows = rows_of(tmp_path / "student")
    assert [row["update"] for row in rows] == [1, 2, 3]
    assert all(row.keys() == {"update", "fd_to_teacher", "tiny_bold"} for row in rows)
    assert f"update 3: fd_to_teacher {rows[2]['fd_to_teacher']:.4g}, tiny_bold" in capsys.readouterr().out
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "student" / "logs").glob("*"), None))).Reload()
    logged = [event.value for event in events.Scalars("validation/fd_to_teacher")]
    assert logged == pytest.approx([row["fd_to_teacher"] for row in rows])


def test_a_resumed_run_has_every_row_once_whatever_a_kill_left(argv, tmp_path: Path) -> None:
    options = dict(checkpointing_steps=2, logging_steps=1, max_train_steps=4)
    train_only(argv("straight", **options))
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "straight", broken)
    shutil.rmtree(broken / "checkpoint-4")
    with open(broken / "logs" / "health.jsonl", "a") as file:
        file.write('{"update": 5, "dist')  # cut off by a kill
    append_row(broken / "validation" / "metrics.jsonl", {"update": 5, "fd_to_teacher": 0.0})
    train_only(argv("broken", resume_from_checkpoint="latest", **options))
    assert rows_of(broken) == rows_of(tmp_path / "straight")
    health = [read_rows(folder / "logs" / "health.jsonl") for folder in (broken, tmp_path / "straight")]
    assert [row["update"] for row in health[0]] == [1, 2, 3, 4]
    assert [row["fake_loss"] for row in health[0]] == [row["fake_loss"] for row in health[1]]


def test_the_best_checkpoint_is_kept_whatever_the_limit_and_is_exported(argv, priced, tmp_path: Path) -> None:
    flags = priced([1.0, 3.0, 2.0], "--load_best_model_at_end", "--checkpoints_total_limit", "1")
    train_only(argv("best", flags, checkpointing_steps=1))
    folder = tmp_path / "best"
    assert read_record(folder / "checkpoint-best")["update"] == 2
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-3"]
    with Trainer(parse_args(argv("best", flags, checkpointing_steps=1, resume_from_checkpoint="latest"))) as trainer:
        trainer.export()
    assert json.loads((folder / "rdm_config.json").read_text())["training"]["updates"] == 2
    train_only(argv("two", [], max_train_steps=2))
    export.main([str(folder / "checkpoint-best"), "--format", "lora", "--output_dir", str(tmp_path / "exported")])
    for student in (folder, tmp_path / "exported"):
        ours, theirs = load_file(student / LORA), load_file(tmp_path / "two" / LORA)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_of_a_distance_the_lowest_is_the_best(argv, priced, tmp_path: Path) -> None:
    assert not parse_args(argv("x", [*METRICS, "--metric_for_best_model", "fd_to_teacher"])).validation.more_is_better
    train_only(argv("student", priced([2.0, 1.0, 3.0], "--no-greater_is_better")))
    assert read_record(tmp_path / "student" / "checkpoint-best")["update"] == 2


def test_early_stopping_ends_the_run_and_stays_so_until_it_has_more_patience(
    argv, priced, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = priced([3.0, 3.05, 2.0, 9.0], "--early_stopping_threshold", "0.1", "--early_stopping_patience")
    train_only(argv("student", [*flags, "2"], max_train_steps=6))
    assert "Early stopping at update 3: price has not become better by more than 0.1" in capsys.readouterr().out
    folder = tmp_path / "student"
    assert (folder / LORA).exists() and [path.name for path in list_checkpoints(folder)] == ["checkpoint-3"]
    train_only(argv("student", [*flags, "2"], max_train_steps=6, resume_from_checkpoint="latest"))
    assert [row["update"] for row in rows_of(folder)] == [1, 2, 3]
    more = priced([1.0] * 3, "--early_stopping_patience", "4")
    train_only(argv("student", more, max_train_steps=6, resume_from_checkpoint="latest"))
    assert [row["price"] for row in rows_of(folder)] == pytest.approx([3.0, 3.05, 2.0, 1.0, 1.0, 1.0])


def test_patience_counts_as_that_of_transformers() -> None:
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    for more in (True, False):
        theirs, state = EarlyStoppingCallback(3, 0.2), TrainerState()
        arguments = TrainingArguments(greater_is_better=more, report_to="none", use_cpu=True)
        values: list[float | None] = []
        for value in torch.rand(40, generator=generator).tolist():
            values.append(value)
            theirs.check_metric_value(arguments, state, TrainerControl(), value)
            if is_better(value, state.best_metric, more):
                state.best_metric = value
            assert values_without_gain(values, more, 0.2) == theirs.early_stopping_patience_counter


def test_a_value_that_is_not_finite_is_no_gain() -> None:
    assert values_without_gain([1.0, None, None], True, 0.0) == 2
    assert not is_better(None, None, True) and is_better(1.0, None, True)


def test_a_metric_that_fails_is_a_warning(argv, priced, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"The student of update 2 was not measured \(The reward price raised IndexError"
    ):
        train_only(argv("student", priced([1.0]), max_train_steps=2))
    assert [row["update"] for row in rows_of(tmp_path / "student")] == [1]


def test_a_kill_while_the_best_is_replaced_leaves_a_whole_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def replace_best() -> None:
        save_checkpoint(folder, make_state(2, value=2.0), {}, name="checkpoint-best")

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        save_checkpoint(folder, make_state(1), {}, name="checkpoint-best")

    numbers = []
    for number in kills(replace_best, folder, prepare):
        tidy(folder)
        assert find_checkpoint(folder, "checkpoint-best").name == "checkpoint-best"
        numbers.append(number)
    assert len(numbers) > 5


def test_a_run_that_goes_back_sets_a_newer_best_aside_and_keeps_an_older_one(tmp_path: Path) -> None:
    for update in (1, 2, 3):
        save_checkpoint(tmp_path, make_state(update), {})
    save_checkpoint(tmp_path, make_state(2), {}, name="checkpoint-best")
    set_newer_aside(tmp_path, tmp_path / "checkpoint-2")
    assert (tmp_path / "checkpoint-best").is_dir()
    place = set_newer_aside(tmp_path, tmp_path / "checkpoint-1")
    assert place is not None and (place / "checkpoint-best").is_dir()
    assert not (tmp_path / "checkpoint-best").exists()


def test_two_processes_measure_what_one_does(argv, tmp_path: Path) -> None:
    # The same micro-batches, and no update that could differ by rounding: a learning rate of next to nothing.
    options = dict(learning_rate=1e-30, max_train_steps=1, checkpointing_steps=1)
    best = [*METRICS, "--metric_for_best_model", "fd_to_teacher"]
    train_only(argv("one-still", best, **options))
    in_two_processes(lambda: train_only(argv("two-still", best, **options)))
    assert rows_of(tmp_path / "two-still") == rows_of(tmp_path / "one-still")
    assert read_record(tmp_path / "two-still" / "checkpoint-best")["metrics"] == rows_of(tmp_path / "two-still")


def test_rows_survive_as_json_and_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    append_row(path, {"update": 1, "a": float("nan"), "b": 0.1})
    append_row(path, {"update": 2, "alarms": ["ä <b>"]})
    assert read_rows(path) == [{"update": 1, "a": None, "b": 0.1}, {"update": 2, "alarms": ["ä <b>"]}]
    write_rows(path, read_rows(path, until=0))
    assert not path.exists() and read_rows(path) == []


def test_the_features_have_the_names_of_rdm_evaluate() -> None:
    assert set(FEATURES) == feature_networks.FEATURES.keys()


def test_the_recorded_command_shows_no_folder_of_a_second_metric() -> None:
    words = ["--validation_metrics", "fd_to_data", "/home/me/mine.py:price", "--rank", "2"]
    assert command_line("x.py", words).endswith("--validation_metrics fd_to_data mine.py:price --rank 2")


@pytest.mark.parametrize(
    ("flags", "saying"),
    [
        (
            ["--reference_data", "x"],
            "--reference_data would have no effect; leave it out, or add --validation_metrics.",
        ),
        (
            ["--early_stopping_patience", "2"],
            "--early_stopping_patience would have no effect; leave it out, or add --v",
        ),
        (
            ["--validation_metrics", "tiny_bold", "tiny_bold"],
            "--validation_metrics names one metric twice; name each once.",
        ),
        ([*METRICS, "--load_best_model_at_end"], "would have no effect; leave it out, or add --metric_for_best_model."),
        (
            [*METRICS, "--metric_for_best_model", "hpsv2"],
            "it must be one of --validation_metrics (fd_to_teacher, tiny_b",
        ),
        ([*METRICS, "--reference_data", "x"], "leave it out, or add fd_to_data to --validation_metrics."),
        (
            [*METRICS, "--metric_for_best_model", "tiny_bold", "--early_stopping_threshold", "1"],
            "--early_stopping_pati",
        ),
        ([*METRICS, "--validation_steps", "9"], "would never be measured: --validation_steps is 9, and --max_train_s"),
        (["--validation_metrics", "tiny_bold", "--features", "tiny"], "--features would have no effect; leave it out"),
        (
            ["--validation_metrics", "fd_to_data"],
            "needs a reference: add --reference_data",
        ),
        (["--validation_metrics", "prompt_accuracy"], "for the embedded teachers alone"),
    ],
)
def test_flags_without_an_effect_are_refused(
    argv, flags: list[str], saying: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        parse_args(argv("x", flags))
    assert saying in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "saying"),
    [
        (["--validation_metrics", "tiny_bald"], "There is no reward 'tiny_bald'"),
        (["--validation_metrics", "tiny_bold:2"], "has a weight, which only --reward takes"),
        ([*METRICS, "--validation_prompts_file", "gone.txt"], "--validation_prompts_file gone.txt does not exist"),
        ([*METRICS, "--reference_teacher", "gone", "--features", "tiny"], "The folder gone does not exist"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_the_teacher_is(argv, flags: list[str], saying: str) -> None:
    with Trainer(parse_args(argv("x", flags))) as trainer, pytest.raises(ValueError, match=saying):
        trainer.check()


def test_a_distance_has_no_interval_and_its_reference_is_read_once(argv) -> None:
    with Trainer(parse_args(argv("x"))) as trainer:
        trainer.check()
        assert isinstance(trainer.metrics.references["fd_to_teacher"], FrechetReference)
