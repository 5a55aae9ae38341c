"""A student in the place of an older one: all of it or nothing; and nothing that the dead leave stays for ever."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from parts_kills import kills

from rdm_diffusers.folders import HeldError, aside, clear_aside, locked
from rdm_diffusers.hub.export import WritingError, finish_exports, replacing

FILES = (
    "rdm_config.json",
    "pytorch_lora_weights.safetensors",
    "scheduler/scheduler_config.json",
    "comfyui/run.safetensors",
)


def write_student(folder: Path, version: str) -> None:
    with replacing(folder) as new:
        assert new.name == folder.name  # as files are named after it
        for name in FILES:
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(version)


def versions(folder: Path) -> set[str]:
    """Of all files of the student; none if the folder is none, for want of a configuration."""
    if not (folder / "rdm_config.json").exists():
        return set()
    return {(folder / name).read_text() for name in FILES}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_killed_export_leaves_the_old_student_or_the_new_one_and_never_a_mixture(folder: Path) -> None:
    def prepare() -> None:
        shutil.rmtree(folder)
        (folder / "checkpoint-1").mkdir(parents=True)
        write_student(folder, "old")

    seen = set()
    for _ in kills(lambda: write_student(folder, "new"), folder, prepare):
        assert versions(folder) in ({"old"}, {"new"}, set())
        finish_exports(folder)  # as the next run, rdm-push, rdm-card and rdm-export do
        assert versions(folder) in ({"old"}, {"new"})
        assert not hidden(folder) and (folder / "checkpoint-1").exists()
        seen |= versions(folder)
    assert seen == {"old", "new"}


def test_what_was_found_of_the_older_student_is_not_shown_of_the_new_one(folder: Path) -> None:
    write_student(folder, "old")
    (folder / "pictures").mkdir()
    for name in ("metrics.json", "samples.png", "evaluation.json", "pictures/0.png", "README.md", "notes.txt"):
        (folder / name).write_text("old")
    write_student(folder, "new")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["README.md", "notes.txt", "comfyui", "pytorch_lora_weights.safetensors", "rdm_config.json", "scheduler"]
    )


def test_an_export_that_fails_leaves_the_older_student_whole(folder: Path) -> None:
    write_student(folder, "old")
    with pytest.raises(WritingError, match=r"could not be written to .*run \(no space\); its checkpoints are intact"), \
            replacing(folder) as new:  # fmt: skip
        (new / "rdm_config.json").write_text("half")
        raise OSError("no space")
    assert versions(folder) == {"old"} and not hidden(folder)


def test_an_export_that_is_interrupted_while_it_moves_is_completed(folder: Path, monkeypatch) -> None:
    write_student(folder, "old")
    rename, renamed = Path.rename, []

    def interrupted(path: Path, target: Path) -> Path:
        renamed.append(path.name)
        if renamed.count("scheduler") == 1 and path.name == "scheduler":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_student(folder, "new")
    assert versions(folder) == {"new"} and not hidden(folder)


def test_hidden_folders_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with aside(tmp_path) as folder:
            (folder / "weights").write_text("half")
            os._exit(0)
    os.waitpid(child, 0)
    own = tmp_path / ".rdm-export-of-mine"
    own.mkdir()
    with aside(tmp_path) as folder:
        assert sorted(hidden(tmp_path)) == sorted([own.name, folder.name, f"{folder.name}.lock"])
        clear_aside(tmp_path)
        assert folder.exists()
    assert hidden(tmp_path) == [own.name]


def test_a_lock_is_held_by_one_and_by_no_dead_process_even_if_its_child_lives(tmp_path: Path) -> None:
    path, (reader, writer) = tmp_path / "lock", os.pipe()
    with locked(path) as known:
        assert known
        with pytest.raises(HeldError, match=f"process {os.getpid()} on "), locked(path):
            pass
    assert not path.exists()
    holder = os.fork()
    if holder == 0:
        with locked(path):
            if os.fork() == 0:  # a worker that outlives it, until we let go of the pipe
                os.close(writer)
                os.read(reader, 1)
            os._exit(0)
    os.waitpid(holder, 0)
    assert path.exists()
    with locked(path) as known:
        assert known
    os.close(writer)


def test_where_there_are_no_locks_nothing_fails(tmp_path: Path, monkeypatch) -> None:
    def unknown(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("rdm_diffusers.folders.fcntl.flock", unknown)
    with locked(tmp_path / "lock") as known:
        assert not known
    with aside(tmp_path) as folder:
        assert folder.exists()
        clear_aside(tmp_path)
        assert folder.exists()
