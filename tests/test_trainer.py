"""A run from Python: the same steps as the scripts', with callbacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parts import PROMPTS, run_arguments
from safetensors.torch import load_file

import train_rdm_lora
from rdm_diffusers import Callback, RdmDistillationPipeline, RunConfig, Trainer
from rdm_diffusers.config.command_line import parse_args


class Recorder(Callback):
    """Notes what it hears, and stops the training after an update if it is told to."""

    def __init__(self, last: int | None = None) -> None:
        self.heard: list[tuple] = []
        self.last = last

    def on_update(self, trainer, health) -> None:
        self.heard.append(("update", trainer.state.update, health["fake_loss"]))
        if trainer.state.update == self.last:
            trainer.stop()

    def on_validation(self, trainer, picture) -> None:
        self.heard.append(("validation", trainer.state.update, picture.size))

    def on_checkpoint(self, trainer, checkpoint) -> None:
        self.heard.append(("checkpoint", trainer.state.update, checkpoint.name))


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    return lambda **changes: run_arguments(teacher_folder, prompts_file, tmp_path / "student", **changes)


def test_a_run_from_python_leaves_the_student_that_the_script_leaves(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    train_rdm_lora.main(run_arguments(teacher_folder, prompts_file, tmp_path / "script"))
    config = RunConfig.from_yaml(tmp_path / "script" / "config.yaml", output_dir=str(tmp_path / "python"))
    with Trainer(config) as trainer:
        output = trainer.train()
        assert (output.updates, output.signal) == (2, 0)
        folder = trainer.export()
        trainer.evaluate()
    names = {"script", "python"}
    ours, theirs = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in sorted(names))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {"samples.png", "metrics.json", "README.md"} <= {path.name for path in folder.iterdir()}
    pipeline = RdmDistillationPipeline.from_pretrained(folder)
    assert pipeline(PROMPTS[0]).images[0].size == (32, 32)


def test_callbacks_hear_of_updates_pictures_and_checkpoints(argv) -> None:
    recorder = Recorder()
    with Trainer(parse_args(argv(validation_steps=2, checkpointing_steps=2)), [recorder]) as trainer:
        trainer.train()
    assert [event[:2] for event in recorder.heard] == [
        ("update", 1), ("update", 2), ("validation", 2), ("checkpoint", 2),
    ]  # fmt: skip
    assert all(value > 0 for event, _, value in recorder.heard if event == "update")
    assert recorder.heard[-1][2] == "checkpoint-2"


def test_a_callback_that_stops_the_training_leaves_a_checkpoint_to_go_on_from(argv, tmp_path: Path) -> None:
    with Trainer(parse_args(argv(max_train_steps=3)), [Recorder(last=1)]) as trainer:
        output = trainer.train()
    assert (output.updates, output.signal) == (1, 0)
    assert (tmp_path / "student" / "checkpoint-1").is_dir()
    with Trainer(parse_args(argv(max_train_steps=3, resume_from_checkpoint="latest"))) as trainer:
        assert trainer.train().updates == 3


def test_a_folder_is_held_from_the_first_step_until_the_end(argv) -> None:
    with Trainer(parse_args(argv())) as trainer:
        trainer.check()
        with pytest.raises(ValueError, match="is in use by another run"):
            Trainer(parse_args(argv())).check()
    Trainer(parse_args(argv())).check()


def test_a_check_that_fails_lets_go_of_the_folder_and_fails_again(argv, teacher_folder: Path, tmp_path: Path) -> None:
    wrong = Trainer(parse_args(run_arguments(teacher_folder, tmp_path / "missing.txt", tmp_path / "student")))
    for _ in range(2):
        with pytest.raises(ValueError, match="does not exist"):
            wrong.check()
    Trainer(parse_args(argv())).check()
