"""Killed at the worst moment and resumed, a run is an uninterrupted run, bit for bit; damage is passed over."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from parts import read_state, run_arguments, train_only

from rdm_diffusers.networks import STUDENT
from rdm_diffusers.training import checkpoints, loop
from rdm_diffusers.training.checkpoint_files import find_checkpoint, list_checkpoints

TOTAL, KILLED_AT = 4, 3


def die(*args: object) -> NoReturn:
    """As the system ends a process that uses too much memory, or a scheduler one whose time is over."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def in_the_middle_of_a_file() -> None:
    whole = checkpoints.save_file

    def half(tensors: dict, path: Path) -> None:
        whole(tensors, path)
        if KILLED_AT in {int(part) for part in path.parent.name.split("-") if part.isdigit()}:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            die()

    checkpoints.save_file = half


def before_the_renaming() -> None:
    rename = checkpoints.put_in_place

    def put_in_place(partial: Path, target: Path) -> None:
        if target.name == f"checkpoint-{KILLED_AT}":
            die()
        rename(partial, target)

    checkpoints.put_in_place = put_in_place


def between_the_students_and_the_fake_scores_step() -> None:
    stepped = loop.step

    def step(state, role: str, checks) -> torch.Tensor:
        norm = stepped(state, role, checks)
        if role == STUDENT and state.update == KILLED_AT - 1:
            die()
        return norm

    loop.step = step


def while_an_old_checkpoint_is_removed() -> None:
    remove = checkpoints.shutil.rmtree

    def rmtree(path: Path, *args, **kwargs) -> None:
        if Path(path).name == ".old-checkpoint-1":
            (path / "state.json").unlink()
            die()
        remove(path, *args, **kwargs)

    checkpoints.shutil.rmtree = rmtree


MOMENTS = [
    in_the_middle_of_a_file,
    before_the_renaming,
    between_the_students_and_the_fake_scores_step,
    while_an_old_checkpoint_is_removed,
]


def killed(student: str, argv: list[str], arrange: Callable[[], None]) -> None:
    """Trains in a process of its own that is killed where `arrange` says."""
    child = os.fork()
    if child == 0:
        try:
            arrange()
            train_only(argv, student)
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def assert_same_state(one: Path, other: Path) -> None:
    states = [read_state(folder / f"checkpoint-{TOTAL}") for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    records = [json.loads((folder / f"checkpoint-{TOTAL}" / "state.json").read_text()) for folder in (one, other)]
    assert records[0]["monitor"] == records[1]["monitor"]
    assert records[0]["digests"] == records[1]["digests"]


@pytest.fixture(scope="module")
def argv(teacher_folder: Path, prompts_file: Path):
    """Makes the command line of a run that saves after every update and keeps two checkpoints."""

    def make(student: str, folder: Path, accumulation: int, **changes) -> list[str]:
        own = {} if student == "lora" else {"rank": None}
        return run_arguments(
            teacher_folder, prompts_file, folder, max_train_steps=TOTAL, checkpointing_steps=1,
            checkpoints_total_limit=2, train_batch_size=4, gradient_accumulation_steps=accumulation,
            num_validation_images=1, **own, **changes,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def straight(argv, tmp_path_factory: pytest.TempPathFactory):
    """The folder of an uninterrupted run, made once for each kind."""
    made: dict[tuple[str, int], Path] = {}

    def folder(student: str, accumulation: int) -> Path:
        if (student, accumulation) not in made:
            made[student, accumulation] = tmp_path_factory.mktemp("straight") / "run"
            train_only(argv(student, made[student, accumulation], accumulation), student)
        return made[student, accumulation]

    return folder


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
@pytest.mark.parametrize(("student", "accumulation"), [("lora", 1), ("full", 2)])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    moment: Callable[[], None], student: str, accumulation: int, argv, straight, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    killed(student, argv(student, folder, accumulation), moment)
    assert not (folder / f"checkpoint-{TOTAL}").exists()
    train_only(argv(student, folder, accumulation, resume_from_checkpoint="latest"), student)
    assert_same_state(straight(student, accumulation), folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in straight(student, accumulation).iterdir())


def damaged_file(checkpoint: Path) -> None:
    path = checkpoint / "fake_score.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # one bit, in the midst of a tensor
    path.write_bytes(content)


def cut_file(checkpoint: Path) -> None:
    path = checkpoint / "student.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def missing_file(checkpoint: Path) -> None:
    (checkpoint / "ema.safetensors").unlink()


def cut_record(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text('{"update": 4, "dig')


@pytest.mark.parametrize(
    "damage", [damaged_file, cut_file, missing_file, cut_record], ids=lambda damage: damage.__name__
)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(damage, argv, straight, tmp_path: Path) -> None:
    folder = shutil.copytree(straight("lora", 1), tmp_path / "run")
    damage(folder / "checkpoint-4")
    with pytest.warns(UserWarning, match=r"checkpoint-4 is damaged .*; the checkpoint before it is used"):
        train_only(argv("lora", folder, 1, resume_from_checkpoint="latest"))
    assert_same_state(straight("lora", 1), folder)


def test_a_damaged_checkpoint_that_is_asked_for_is_refused_and_where_all_are_the_run_says_so(
    straight, tmp_path: Path
) -> None:
    folder = shutil.copytree(straight("lora", 1), tmp_path / "run")
    for checkpoint in list_checkpoints(folder):
        damaged_file(checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint-4 is damaged \(fake_score.safetensors changed since"):
        find_checkpoint(folder, "checkpoint-4")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="There is no undamaged checkpoint in"):
        find_checkpoint(folder, "latest")
