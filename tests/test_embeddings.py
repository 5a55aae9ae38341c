"""A cache of prompt embeddings is whole or made anew, whatever happened to it and whoever else makes it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parts import PROMPTS, files_of_at_most, make_conditioning, run_arguments, train_only
from parts_families import make_pipeline
from safetensors.torch import load_file
from torch import Tensor

from rdm_diffusers.families import FAMILIES, Conditioning, PromptOptions, Teacher, load_teacher
from rdm_diffusers.families.base import LORA_FILE
from rdm_diffusers.training import embeddings
from rdm_diffusers.training.embeddings import embed_prompts, fingerprint_of


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Teacher:
    return load_teacher(str(teacher_folder), torch.float32)


def embed(teacher: Teacher, cache: Path, prompts: tuple[str, ...] = PROMPTS) -> Tensor:
    """The embeddings `[N, L, D]`, through a cache."""
    read = embed_prompts(teacher, list(prompts), str(cache), fingerprint_of(teacher, list(prompts)))
    return read(range(len(prompts))).tensors["prompt_embeds"]


def files_in(cache: Path) -> list[Path]:
    """All files of a cache but its lock."""
    return [path for path in (cache / "rdm_embeddings").rglob("*") if path.is_file() and path.suffix != ".lock"]


def cached(cache: Path) -> Path:
    """The one file of a cache of few prompts."""
    (file,) = files_in(cache)
    return file


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


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit in the schema": lambda path: flip(path, 0.01),
    "a bit in the middle": lambda path: flip(path, 0.5),
    "the last bits": lambda path: flip(path, 1.0),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "emptied": lambda path: path.write_bytes(b""),
    "another's": lambda path: path.write_bytes(path.read_bytes()[::-1]),
    "version 0.1.0's": lambda path: path.rename(path.parent.with_suffix(".arrow")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_anew_with_one_sentence(damage: str, teacher: Teacher, filled, cache: Path) -> None:
    DAMAGE[damage](cached(cache))
    with pytest.warns(UserWarning, match=r"The cached prompt embeddings .* are .*; they are made anew") as said:
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
    assert not files_in(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"could not be cached in .*; free some .* --cache_dir"):
        embed(teacher, tmp_path / "file")


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "QwenImage21Pipeline", "Krea2Pipeline"])
def test_each_tensor_keeps_its_dtype_and_its_bits_and_padding_takes_no_space(name: str, tmp_path: Path) -> None:
    pipeline = make_pipeline(name).to(torch.bfloat16)
    teacher = Teacher(pipeline, FAMILIES[name], name, PromptOptions(512, embedded_guidance=3.5))
    read = embed_prompts(teacher, PROMPTS, str(tmp_path), "fingerprint", batch_size=2)
    size = 0
    for start in (0, 2, 4):
        expected = teacher.encode_prompts(PROMPTS[start : start + 2]).tensors
        found = read(range(start, start + len(expected["prompt_embeds"]))).tensors
        assert found["prompt_embeds"].dtype == torch.bfloat16
        for each, tensor in expected.items():
            assert found[each].dtype == tensor.dtype and torch.equal(found[each], tensor)
            size += tensor.nbytes
    file = cached(tmp_path).stat().st_size
    assert file < size / 2 if name != "FluxPipeline" else size < file < size + 2000


def test_what_does_not_fit_on_the_disk_is_one_sentence_before_it_is_encoded(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * 10**9))
    monkeypatch.setattr(Teacher, "encode_prompts", lambda self, batch: once.append(batch) or encoded)
    once, encoded = [], make_conditioning(8)
    with pytest.raises(OSError, match=r"\(100,000,000 prompts take about 32.0 GB, and 2.0 GB are free\); free .*fly"):
        embed_prompts(teacher, range(10**8), str(tmp_path), "fingerprint")
    assert len(once) == 1
    assert not files_in(tmp_path)


def test_prompts_that_are_encoded_on_the_fly_train_the_same_student(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    students = []
    for how in ("cached", "on_the_fly", "on_the_fly --offload"):
        folder, flag = tmp_path / how, how.split()[0]
        options = {"encode_prompts": flag, "encode_batch_size": 1, "cache_dir": folder / "cache"}
        train_only(run_arguments(teacher_folder, prompts_file, folder, **options, offload="offload" in how or None))
        assert (folder / "cache" / "rdm_embeddings").exists() == (how == "cached")
        students.append(load_file(folder / LORA_FILE))
    assert all(torch.equal(student[name], students[0][name]) for student in students for name in students[0])


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
    assert not files_in(tmp_path)
    assert torch.equal(embed(teacher, tmp_path), filled[1])
    assert cached(tmp_path).name == cached(filled[0]).name


def test_an_interrupted_encoding_goes_on_where_it_was(
    teacher: Teacher, filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "PART", 2)
    encode, read = Teacher.encode_prompts, []

    def interrupted(self: Teacher, prompts: list[str]) -> Conditioning:
        read.extend(prompts)
        if PROMPTS[3] in prompts:
            raise KeyboardInterrupt
        return encode(self, prompts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Teacher, "encode_prompts", interrupted)
        embed(teacher, tmp_path)
    assert read == list(PROMPTS[:4])
    monkeypatch.setattr(Teacher, "encode_prompts", lambda self, batch: read.extend(batch) or encode(self, batch))
    assert torch.equal(embed(teacher, tmp_path), filled[1])
    assert read == [*PROMPTS[:4], *PROMPTS[2:]]
