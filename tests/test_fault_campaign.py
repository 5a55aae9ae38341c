"""The fault campaign judges rightly: what is whole, what is lost, what is silently wrong, and what is said."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def campaign() -> Iterator[SimpleNamespace]:
    """The campaign's modules."""
    sys.path.insert(0, str(BENCHMARKS))
    names = ("faults", "fault_checkpoints", "fault_damage", "fault_scenes", "fault_trials")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(BENCHMARKS))


def test_a_sample_of_the_campaign_loses_nothing_and_hides_nothing(campaign, tmp_path: Path) -> None:
    words = ["--work_dir", str(tmp_path), "--output", str(tmp_path / "faults.json"), "--trials", "20"]
    scenes = ["checkpoint 3 beside 1, 2, limit 2", "checkpoint 3 beside 2", "checkpoint by name"]
    record = campaign.faults.main([*words, "--scenes", *scenes])
    outcomes = record["summary"]["outcomes"]
    assert sum(outcomes.values()) == record["summary"]["trials"] == 20
    assert not any(outcomes[bad] for bad in campaign.fault_trials.BAD), record["trials"]
    assert json.loads((tmp_path / "faults.json").read_text()) == record
    again = campaign.faults.main([*words, "--scenes", *scenes])
    assert again == record  # nothing was tried twice: the seconds are the same, too


def test_every_operation_has_its_moment_and_every_written_file_its_half(campaign, tmp_path: Path) -> None:
    def act(folder: Path) -> None:
        (folder / "a").write_text("0123456789")
        (folder / "a").rename(folder / "b")
        (folder / "b").unlink()

    found = campaign.fault_trials.moments(tmp_path, act)
    assert [what for _, what in found] == ["before open a", "half of a", "before os.rename a", "before os.remove b"]
    for moment, what in found:
        folder = tmp_path / what.replace(" ", "-")
        folder.mkdir()
        assert campaign.fault_trials.kill(folder, act, moment)
        left = {path.name: path.read_text() for path in folder.iterdir()}
        whole = "0123456789"
        expected = {"before open a": {}, "half of a": {"a": whole[:5]}, "before os.rename a": {"a": whole}}
        assert left == expected.get(what, {"b": whole})


def test_a_reader_that_is_wrong_and_says_nothing_is_silent(campaign) -> None:
    def warned() -> int:
        warnings.warn("a.txt is damaged; the one before it is used.", stacklevel=2)
        return 2

    def refused() -> int:
        raise ValueError("a.txt: a library's word")

    readers = {"harmless": lambda: 1, "silent": lambda: 2, "noticed": warned, "traceback": lambda: [][0]}
    for outcome, read in readers.items():
        assert campaign.fault_trials.watched(read, lambda result: result == 1, ["a.txt"]).outcome == outcome
    assert campaign.fault_trials.watched(refused, bool, ["a.txt"]).outcome == "noticed"
    assert campaign.fault_trials.watched(refused, bool, ["b.txt"]).outcome == "traceback"


def test_a_checkpoint_that_is_gone_is_lost_and_one_with_other_numbers_silent(campaign, tmp_path: Path) -> None:
    room = campaign.fault_checkpoints
    scene = room.saving(1, 2)
    for name in ("gone", "wrong"):
        scene.prepare(tmp_path / name)
    for path in (tmp_path / "gone" / "checkpoint-2").iterdir():
        path.unlink()
    assert scene.judge(tmp_path / "gone").outcome == "lost"
    state = room.make_state(3)
    state.optimizers["student"].parameters[0].data += 1
    room.save_checkpoint(tmp_path / "wrong", state, {"seed": 0})
    assert scene.judge(tmp_path / "wrong").outcome == "silent"


@pytest.mark.parametrize("kind", ["flipped", "cut", "emptied", "missing", "zeroed", "swapped"])
def test_damage_changes_one_file_as_its_seed_says(campaign, kind: str, tmp_path: Path) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    content = bytes(range(1, 251)) * 4
    outcomes = []
    for seed in (0, 0, 1):
        file.write_bytes(content)
        other.write_bytes(content[::-1])
        said = campaign.fault_damage.DAMAGES[kind](file, campaign.faults.Random(seed), other)
        outcomes.append((said, file.read_bytes() if file.exists() else None))
        assert outcomes[-1][1] != content and other.read_bytes() == content[::-1]
    assert outcomes[0] == outcomes[1]
