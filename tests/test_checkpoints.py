"""Checkpoints: rotated, found by name, written whole or not at all, and without pickles."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from parts import change, files_of_at_most, make_run, run_arguments, train_run
from safetensors.torch import load_file

from rdm_diffusers.commands import export
from rdm_diffusers.families import LORA_FILE
from rdm_diffusers.networks import FAKE_SCORE
from rdm_diffusers.training import checkpoints
from rdm_diffusers.training.checkpoint_files import files_of, find_checkpoint, list_checkpoints, read_part
from rdm_diffusers.training.checkpoints import load_checkpoint, save_checkpoint
from rdm_diffusers.training.finite import NonFiniteError


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run that saves after every update."""
    return lambda **changes: run_arguments(
        teacher_folder, prompts_file, tmp_path / "student", **{"checkpointing_steps": 1, **changes}
    )


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_the_newest_checkpoints_are_kept(argv, tmp_path: Path) -> None:
    train_run(make_run(argv(max_train_steps=4, checkpoints_total_limit=2)))
    assert contents(tmp_path / "student") == ["checkpoint-3", "checkpoint-4"]


def test_all_checkpoints_are_kept_by_default_in_the_order_of_their_updates(argv, tmp_path: Path) -> None:
    it = make_run(argv())
    for update in (100, 9, 20):
        it.state.update = update
        save_checkpoint(tmp_path / "student", it.state, it.arguments)
    names = [path.name for path in list_checkpoints(tmp_path / "student")]
    assert names == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert find_checkpoint(tmp_path / "student", "latest").name == "checkpoint-100"


def test_a_copy_with_a_name_of_its_own_is_left_alone_and_stops_nothing(argv, tmp_path: Path) -> None:
    train_run(make_run(argv()))
    folder = tmp_path / "student"
    shutil.copytree(folder / "checkpoint-1", folder / "checkpoint-best")
    train_run(make_run(argv(checkpoints_total_limit=1, resume_from_checkpoint="latest")))
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2"]
    assert find_checkpoint(folder, "latest").name == "checkpoint-2"
    assert find_checkpoint(folder, "checkpoint-best") == folder / "checkpoint-best"


def test_a_checkpoint_is_found_by_its_name_or_its_path(argv, tmp_path: Path) -> None:
    train_run(make_run(argv()))
    folder = tmp_path / "student"
    assert find_checkpoint(folder, "checkpoint-1") == folder / "checkpoint-1"
    assert find_checkpoint(tmp_path, str(folder / "checkpoint-1")) == folder / "checkpoint-1"


@pytest.mark.parametrize(
    ("name", "message"),
    [("latest", "There is no checkpoint in"), ("checkpoint-7", "checkpoint-7 is no checkpoint; use `latest`")],
)
def test_a_missing_checkpoint_is_one_clear_sentence(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        find_checkpoint(tmp_path, name)


def test_a_checkpoint_holds_safetensors_and_json_only(argv, tmp_path: Path) -> None:
    train_run(make_run(argv()))
    assert contents(tmp_path / "student" / "checkpoint-2") == [
        "ema.safetensors", "fake_score.safetensors", "state.json", "statistics.safetensors", "student.safetensors",
    ]  # fmt: skip


def test_a_checkpoint_of_another_shape_is_refused(argv, tmp_path: Path) -> None:
    train_run(make_run(argv(rank=2)))
    other = make_run(argv(rank=4, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="does not fit this run"):
        load_checkpoint(find_checkpoint(tmp_path / "student", "latest"), other.state)


def test_statistics_and_the_monitors_memory_survive_a_checkpoint(argv, tmp_path: Path) -> None:
    written, read = make_run(argv()), make_run(argv(resume_from_checkpoint="latest"))
    written.state.statistics.update("a/b", torch.tensor([1.0, 0.0]), torch.tensor([3, 0]), 0.9)
    written.state.statistics.update("c", torch.tensor(2.0), torch.tensor(1), 0.9)
    written.state.monitor.state |= {"updates": 30.0, "smooth/fake_loss": 1 / 3}
    load_checkpoint(save_checkpoint(tmp_path, written.state, {}), read.state)
    statistics = read.state.statistics
    assert statistics.state.keys() == {"a/b", "c"}
    assert all(torch.equal(value, statistics.state[name]) for name, value in written.state.statistics.state.items())
    assert statistics.mean("a/b").tolist() == pytest.approx([1 / 3, 0])
    assert read.state.monitor.state == written.state.monitor.state


def assert_only_the_first_checkpoint_is_there_and_whole(it, folder: Path) -> None:
    assert contents(folder) == ["checkpoint-1"]
    load_checkpoint(find_checkpoint(folder, "latest"), it.state)
    assert it.state.update == 1


def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(argv, tmp_path: Path, monkeypatch) -> None:
    def full(tensors, path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    it = make_run(argv(max_train_steps=1))
    train_run(it)
    change(it, "optimisation", max_train_steps=2)
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written .*No space left.*earlier ones are intact"):
        train_run(it)
    assert_only_the_first_checkpoint_is_there_and_whole(it, tmp_path / "student")


def test_a_system_that_refuses_to_write_keeps_the_last_good_checkpoint_and_says_so(argv, tmp_path: Path) -> None:
    it = make_run(argv(max_train_steps=1))
    train_run(it)
    change(it, "optimisation", max_train_steps=2)
    with files_of_at_most(4096), pytest.raises(OSError, match=r"checkpoint-2 could not be written .*are intact"):
        train_run(it)
    assert_only_the_first_checkpoint_is_there_and_whole(it, tmp_path / "student")


def test_saving_the_same_update_twice_leaves_one_whole_checkpoint(argv, tmp_path: Path) -> None:
    it = make_run(argv(max_train_steps=1))
    train_run(it)
    save_checkpoint(tmp_path / "student", it.state, it.arguments)
    assert_only_the_first_checkpoint_is_there_and_whole(it, tmp_path / "student")


def test_an_update_that_is_not_finite_saves_nothing_over_the_last_good_checkpoint(argv, tmp_path: Path) -> None:
    it = make_run(argv(max_train_steps=1))
    train_run(it)
    change(it, "optimisation", max_train_steps=2)
    with torch.no_grad():
        it.networks.parameters(FAKE_SCORE)[0].fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"R_dm is not finite for prompt .*, student step [12]"):
        train_run(it)
    assert_only_the_first_checkpoint_is_there_and_whole(it, tmp_path / "student")


def test_gradients_that_are_not_finite_never_reach_the_weights(argv) -> None:
    it = make_run(argv(max_train_steps=1))
    for parameter in it.networks.parameters(FAKE_SCORE):
        parameter.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteError, match="gradient"):
        train_run(it)
    assert all(parameter.isfinite().all() for parameter in it.networks.parameters(FAKE_SCORE))


def test_a_checkpoint_in_pieces_is_the_one_in_whole_files_to_all_who_read_it(argv, tmp_path, monkeypatch) -> None:
    train_run(make_run(argv(max_train_steps=1)))
    whole = (tmp_path / "student").rename(tmp_path / "whole") / "checkpoint-1"
    monkeypatch.setattr(checkpoints, "PIECE", 10_000)
    train_run(make_run(argv(max_train_steps=1)))
    pieces = find_checkpoint(tmp_path / "student", "latest")
    for part in ("student", "fake_score", "ema", "statistics"):
        one, many = read_part(whole, part), read_part(pieces, part)
        assert one.keys() == many.keys() and all(torch.equal(many[name], one[name]) for name in one)
    names = [path.name for path in files_of(pieces, "student")]
    assert names[0] == f"student-00001-of-{len(names):05}.safetensors" and len(names) > 1
    assert max(path.stat().st_size for path in files_of(pieces, "student")) < 2 * 10_000
    for checkpoint, folder in ((whole, "exported-whole"), (pieces, "exported-pieces")):
        export.main([str(checkpoint), "--format", "lora", "--output_dir", str(tmp_path / folder)])
    one, many = (load_file(tmp_path / folder / LORA_FILE) for folder in ("exported-whole", "exported-pieces"))
    assert all(torch.equal(many[name], one[name]) for name in one)
    files_of(pieces, "student")[1].unlink()
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="There is no undamaged"):
        find_checkpoint(tmp_path / "student", "latest")
