"""A cache of prompt embeddings is whole or made anew, whatever happened to it and whoever else makes it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from parts import PROMPTS, files_of_at_most
from torch import Tensor

from rdm_diffusers.families import Teacher, load_teacher
from rdm_diffusers.training.embeddings import embed_prompts, fingerprint_of


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Teacher:
    return load_teacher(str(teacher_folder), torch.float32)


def embed(teacher: Teacher, cache: Path, prompts: tuple[str, ...] = PROMPTS) -> Tensor:
    """The embeddings `[N, L, D]`, through a cache."""
    rows: Dataset = embed_prompts(teacher, list(prompts), str(cache), fingerprint_of(teacher, list(prompts)))
    return torch.stack(list(rows["prompt_embeds"]))


def cached(cache: Path) -> Path:
    """The one file of a cache; beside it there may be a lock alone."""
    files = [path for path in (cache / "rdm_embeddings").iterdir() if path.suffix != ".lock"]
    assert len(files) == 1
    return files[0]


@pytest.fixture(scope="module")
def filled(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    folder = tmp_path_factory.mktemp("cache")
    return folder, embed(teacher, folder)


@pytest.fixture
def cache(filled: tuple[Path, Tensor], tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled[0], tmp_path / "cache"))


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def swap(path: Path) -> None:
    """Another cache's embeddings, as whole as they may be."""
    Dataset.from_dict({"prompt_embeds": torch.zeros(5, 77, 8).tolist()}).save_to_disk(path.parent / "other")
    next((path.parent / "other").glob("*.arrow")).replace(path)
    shutil.rmtree(path.parent / "other")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit in the schema": lambda path: flip(path, 0.01),
    "a bit in the middle": lambda path: flip(path, 0.5),
    "the last bits": lambda path: flip(path, 1.0),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "emptied": lambda path: path.write_bytes(b""),
    "swapped": swap,
    "version 0.1.0's": lambda path: path.rename(path.with_name(path.name.split("-")[0] + path.suffix)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_anew_with_one_sentence(damage: str, teacher: Teacher, filled, cache: Path) -> None:
    DAMAGE[damage](cached(cache))
    with pytest.warns(UserWarning, match=r"The cached prompt embeddings .* are damaged or .* made anew") as said:
        assert torch.equal(embed(teacher, cache), filled[1])
    assert len(said) == 1
    assert cached(cache).name == cached(filled[0]).name


def test_a_whole_cache_is_read_and_not_written(teacher: Teacher, filled, cache: Path, recwarn) -> None:
    before = cached(cache).stat().st_mtime_ns
    assert torch.equal(embed(teacher, cache), filled[1])
    assert cached(cache).stat().st_mtime_ns == before and not recwarn.list


def test_a_full_disk_is_one_sentence_and_leaves_nothing(teacher: Teacher, tmp_path: Path) -> None:
    with files_of_at_most(1024), pytest.raises(OSError, match=r"could not be cached in .*; free some .* --cache_dir"):
        embed(teacher, tmp_path)
    assert not [path for path in (tmp_path / "rdm_embeddings").iterdir() if path.suffix != ".lock"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"could not be cached in .*; free some .* --cache_dir"):
        embed(teacher, tmp_path / "file")


def forked(action: Callable[[], object]) -> int:
    """The id of a process that does something and ends with 0."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return child


def test_of_two_processes_one_makes_it_and_both_read_it(teacher: Teacher, filled, tmp_path: Path) -> None:
    def both() -> None:
        assert torch.equal(embed(teacher, tmp_path), filled[1])

    children = [forked(both), forked(both)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert cached(tmp_path).name == cached(filled[0]).name


def test_killed_while_it_is_made_it_is_made_anew_and_nothing_stays(
    teacher: Teacher, filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(self: Teacher, prompts: list[str]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        monkeypatch.setattr(Teacher, "encode_prompts", kill)
        embed(teacher, tmp_path)

    assert os.WTERMSIG(os.waitpid(forked(killed), 0)[1]) == signal.SIGKILL
    assert (next((tmp_path / "rdm_embeddings").glob(".partial-*"))).is_dir()
    assert torch.equal(embed(teacher, tmp_path), filled[1])
    assert cached(tmp_path).name == cached(filled[0]).name
