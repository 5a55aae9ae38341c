"""A run that goes back keeps what it leaves behind; `latest` is what was written last; no kill loses the newest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from parts import run_arguments, train_only
from parts_kills import kills, make_state

import train_rdm_lora
from rdm_diffusers.pipelines import StudentConfig
from rdm_diffusers.training.checkpoint_files import (
    damage,
    find_checkpoint,
    list_checkpoints,
    read_record,
    set_newer_aside,
    tidy,
)
from rdm_diffusers.training.checkpoints import is_saved, load_checkpoint, save_checkpoint


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run that saves after every update."""
    options = dict(checkpointing_steps=1, max_train_steps=3, num_validation_images=1)
    return lambda **changes: run_arguments(teacher_folder, prompts_file, tmp_path / "run", **{**options, **changes})


def save_updates(folder: Path, *updates: int, value: float = 1.0) -> None:
    for update in updates:
        save_checkpoint(folder, make_state(update, value), {"seed": 0})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_that_goes_back_sets_newer_checkpoints_aside_and_says_so(argv, tmp_path: Path, capsys) -> None:
    train_only(argv())
    folder = tmp_path / "run"
    back = dict(resume_from_checkpoint="checkpoint-1", checkpoints_total_limit=1, learning_rate=1e-3)
    train_only(argv(**back, max_train_steps=2))
    said = capsys.readouterr().out
    assert f"The run goes back to checkpoint-1; the newer checkpoints are now in {folder}/set-aside-from-che" in said
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2"]
    assert names(folder / "set-aside-from-checkpoint-1") == ["checkpoint-2", "checkpoint-3"]
    assert find_checkpoint(folder, "latest") == folder / "checkpoint-2"
    assert read_record(folder / "checkpoint-2")["arguments"]["learning_rate"] == 1e-3
    record = StudentConfig.load(str(folder)).training
    assert record["updates"] == 2


def test_a_dry_run_and_a_refused_one_set_nothing_aside(argv, tmp_path: Path) -> None:
    train_only(argv())
    before = names(tmp_path / "run")
    train_rdm_lora.main(argv(resume_from_checkpoint="checkpoint-1", dry_run=True))
    with pytest.raises(ValueError, match=r"--max_train_steps 1 is less than the 2 updates of .*checkpoint-2; raise it"):
        train_rdm_lora.main(argv(resume_from_checkpoint="checkpoint-2", max_train_steps=1))
    with pytest.raises(ValueError, match="made with other arguments"):
        train_rdm_lora.main(argv(resume_from_checkpoint="checkpoint-1", rank=4))
    assert names(tmp_path / "run") == before


def test_going_back_twice_keeps_both_courses(tmp_path: Path) -> None:
    for _ in range(2):
        save_updates(tmp_path, 1, 2, 10)
        set_newer_aside(tmp_path, tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1", "set-aside-from-checkpoint-1", "set-aside-from-checkpoint-1-2"]
    assert all(len(names(place)) == 2 for place in tmp_path.glob("set-aside-*"))


def test_nothing_is_set_aside_where_nothing_is_newer(tmp_path: Path) -> None:
    save_updates(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-best")
    assert set_newer_aside(tmp_path, tmp_path / "checkpoint-2") is None
    assert set_newer_aside(tmp_path, tmp_path / "checkpoint-best") is None


def test_another_runs_checkpoint_of_the_same_update_is_set_aside(tmp_path: Path) -> None:
    save_updates(tmp_path / "one", 1, 2)
    save_updates(tmp_path / "other", 2, value=3.0)
    set_newer_aside(tmp_path / "one", tmp_path / "other" / "checkpoint-2")
    assert names(tmp_path / "one") == ["checkpoint-1", "set-aside-from-checkpoint-2"]


@pytest.mark.parametrize("limit", [-3, 0, 1])
def test_whatever_the_limit_what_was_just_written_stays(limit: int, tmp_path: Path) -> None:
    save_updates(tmp_path, 3, 4)
    save_checkpoint(tmp_path, make_state(2), {}, keep=limit)
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_killed_setting_aside_loses_nothing_and_is_completed_the_next_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        save_updates(folder, 1, 2, 3, 4)

    def everywhere() -> list[int]:
        found = [path.parent for path in folder.rglob("state.json")]
        return sorted(read_record(checkpoint)["update"] for checkpoint in found if damage(checkpoint) is None)

    for _ in kills(lambda: set_newer_aside(folder, folder / "checkpoint-2"), folder, prepare):
        assert everywhere() == [1, 2, 3, 4]
        set_newer_aside(folder, folder / "checkpoint-2")
        assert everywhere() == [1, 2, 3, 4]
        assert find_checkpoint(folder, "latest") == folder / "checkpoint-2"
        assert len(list(folder.glob("set-aside-*"))) == 1


@pytest.mark.parametrize("update", [3, 4], ids=["the_same_update_again", "the_next_update"])
def test_a_killed_save_never_loses_the_newest_checkpoint(update: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        save_updates(folder, 2, 3)

    count = 0
    for count in kills(lambda: save_updates(folder, update, value=2.0), folder, prepare):  # noqa: B007
        newest = find_checkpoint(folder, "latest")
        assert read_record(newest)["update"] in {3, update}
        load_checkpoint(newest, make_state())
        tidy(folder)
        assert {"checkpoint-2", "checkpoint-3"} <= set(names(folder)) <= {f"checkpoint-{i}" for i in (2, 3, 4)}
        assert all(damage(path) is None for path in list_checkpoints(folder))
    assert count >= 10


def test_a_checkpoint_that_a_kill_left_beside_its_place_is_found_by_its_name(tmp_path: Path) -> None:
    save_updates(tmp_path, 2)
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-2.replaced")
    assert read_record(find_checkpoint(tmp_path, "checkpoint-2"))["update"] == 2
    tidy(tmp_path)
    assert names(tmp_path) == ["checkpoint-2"]


def test_an_update_is_saved_once_unless_its_checkpoint_is_not_whole_or_not_this_runs(tmp_path: Path) -> None:
    state = make_state(2)
    assert not is_saved(tmp_path, state, {})
    save_checkpoint(tmp_path, state, {"rate": 0.1})
    assert is_saved(tmp_path, state, {"rate": 0.1})
    assert not is_saved(tmp_path, state, {"rate": 0.2})
    assert not is_saved(tmp_path, make_state(2), {"rate": 0.1})
    loaded = make_state()
    load_checkpoint(tmp_path / "checkpoint-2", loaded)
    assert is_saved(tmp_path, loaded, {"rate": 0.1})
    (tmp_path / "checkpoint-2" / "student.safetensors").write_bytes(b"")
    assert not is_saved(tmp_path, state, {"rate": 0.1})


def flips(text: bytes) -> list[bytes]:
    """The text with one bit changed, here and there."""
    return [text[:i] + bytes([text[i] ^ 1]) + text[i + 1 :] for i in range(0, len(text), 7)]


def test_a_flipped_bit_in_a_checkpoints_record_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    save_updates(tmp_path, 2)
    path = tmp_path / "checkpoint-2" / "state.json"
    whole, text = read_record(path.parent), path.read_bytes()
    for damaged in flips(text):
        path.write_bytes(damaged)
        assert damage(path.parent) is not None or read_record(path.parent) == whole
    path.write_text(text.decode().replace("0.25", "0.26"))  # of the monitor
    assert "state.json changed since it was written" in (damage(path.parent) or "")
    with pytest.raises(ValueError, match=r"is damaged \(state.json changed since it was written\); resume from an"):
        load_checkpoint(path.parent, make_state())


def test_checkpoints_of_0_1_0_whose_records_have_no_digest_are_read(tmp_path: Path) -> None:
    save_updates(tmp_path, 2)
    path = tmp_path / "checkpoint-2" / "state.json"
    record = json.loads(path.read_text())
    del record["digest"]
    path.write_text(json.dumps(record, indent=1))
    state = make_state()
    load_checkpoint(find_checkpoint(tmp_path, "latest"), state)
    assert state.update == 2 and state.monitor.state["smooth/fake_loss"] == 0.25


def test_a_checkpoint_of_other_shapes_is_refused_even_where_torch_would_stretch_it(tmp_path: Path) -> None:
    save_updates(tmp_path, 2)
    state = make_state()
    state.optimizers["student"].parameters[0].data = state.optimizers["student"].parameters[0].data.expand(2, 3)
    with pytest.raises(ValueError, match=r"does not fit this run \(a tensor is \[3\] there, and \[2, 3\]"):
        load_checkpoint(tmp_path / "checkpoint-2", state)
