"""Prompt embeddings: cached on the disk and never read once damaged, or encoded whenever they are needed."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from ..families import Conditioning, Teacher
from ..folders import locked
from ..hardware import to_float64
from .cache_parts import remove_unfinished, whole_parts, write_part
from .devices import on_device

Embeddings = Callable[[Sequence[int]], Conditioning]  # the prompts' indices -> their embeddings, one row each
FOLDER = "rdm_embeddings"
PART = 256  # prompts in a file
OPEN_FILES = 64
OLD_SUFFIX = ".arrow"  # of version 0.1.0, whose caches were float32
PATIENCE = 5  # seconds of encoding after which its progress is shown


class CachedEmbeddings:
    """The embeddings of N prompts in files, of which only the rows that are asked for are read.

    Calling it with B indices gives their `Conditioning` of length B on the CPU, in the dtypes of the text encoders. It
    raises OSError if a file cannot be read.

    A file holds the tensors of `PART` prompts as `NUMBER/NAME`, each without the zeros in which its first dimension
    ends, such as the padding of a short prompt; its metadata have the whole shapes.

    Args:
        files: all of them, in order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._file = lru_cache(OPEN_FILES)(partial(_opened, files))
        self._shapes: dict[str, list[int]] = json.loads(self._file(0).metadata()["shapes"])

    def __call__(self, indices: Sequence[int]) -> Conditioning:
        return Conditioning.cat([Conditioning(self._row(index)) for index in indices])

    def _row(self, index: int) -> dict[str, Tensor]:
        """The tensors of one prompt, `[1, ...]`."""
        file, row = self._file(index // PART), {}
        for name, shape in self._shapes.items():
            kept = file.get_tensor(f"{index % PART}/{name}")
            row[name] = kept.new_zeros(1, *shape)
            row[name][(0, slice(len(kept))) if shape else 0] = kept
        return row


def _opened(files: Sequence[Path], number: int) -> Any:
    return safe_open(files[number], "pt")


@dataclass(frozen=True)
class EncodedOnTheFly:
    """Encodes prompts whenever they are asked for, and writes nothing to the disk.

    Calling it with B indices gives their `Conditioning` of length B, on the device.

    Args:
        teacher: whose text encoders are moved to the device.
        prompts: all of them.
        batch_size: how many are encoded at once.
        device: where they are encoded.
        offload: whether the text encoders leave the device after each call.
    """

    teacher: Teacher
    prompts: Sequence[str]
    batch_size: int
    device: torch.device
    offload: bool

    def __post_init__(self) -> None:
        for encoder in [] if self.offload else self.teacher.text_encoders:
            encoder.to(self.device)

    def __call__(self, indices: Sequence[int]) -> Conditioning:
        prompts = [self.prompts[index] for index in indices]
        with on_device(self.teacher.text_encoders, self.device) if self.offload else nullcontext():
            batches = _batches(prompts, self.batch_size)
            return Conditioning.cat([self.teacher.encode_prompts(batch) for batch in batches])


def embed_prompts(
    teacher: Teacher, prompts: Sequence[str], cache_dir: str | None, fingerprint: str, batch_size: int = 8
) -> CachedEmbeddings:
    """Encodes the N prompts with the teacher's text encoders, or finds what an earlier run cached.

    A cache is a folder of parts, named by its fingerprint, in `cache_dir`, by default that of `datasets`. A damaged
    part is made anew, and an interrupted encoding goes on. Of several processes that need it, one makes it, and the
    others wait.

    Raises:
        OSError: if the cache cannot be written or does not fit on the disk.
    """
    parent = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / FOLDER
    folder, parts = parent / fingerprint, range(0, len(prompts), PART)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = whole_parts(folder)
        if len(found) < len(parts):
            with locked(parent / f"{fingerprint}.lock", wait=True) as held:
                if held:
                    remove_unfinished(folder)
                _remove_old(parent, fingerprint)
                found = whole_parts(folder, "The cached prompt embeddings {path} are damaged; they are made anew.")
                _encode(folder, found, teacher, prompts, batch_size)
        return CachedEmbeddings([found[number] for number in range(len(parts))])
    except OSError as error:
        raise OSError(
            f"The prompt embeddings could not be cached in {folder} ({error}); free some space there, name another "
            "folder with --cache_dir, or add --encode_prompts on_the_fly."
        ) from error


def fingerprint_of(teacher: Teacher, prompts: Sequence[str]) -> str:
    """A digest of the prompts, of how they are read, and of the text encoders' weights and dtypes."""
    digest = hashlib.sha256(repr((list(prompts), teacher.options)).encode())
    for encoder in teacher.text_encoders:
        for parameter in encoder.parameters():
            digest.update(repr((str(parameter.dtype), to_float64(parameter).sum().item())).encode())
    return digest.hexdigest()[:32]


def _remove_old(parent: Path, fingerprint: str) -> None:
    for path in parent.glob(f"{fingerprint}*{OLD_SUFFIX}"):
        warnings.warn(f"The cached prompt embeddings {path} are of version 0.1.0; they are made anew.", stacklevel=4)
        path.unlink(missing_ok=True)


def _encode(folder: Path, found: dict[int, Path], teacher: Teacher, prompts: Sequence[str], batch_size: int) -> None:
    """Writes the parts that are not yet `found`, and adds them."""
    count = len(prompts)
    with tqdm(total=count, initial=min(len(found) * PART, count), desc="encode", unit="prompt", delay=PATIENCE) as bar:
        for number in range(-(-count // PART)):
            if number in found:
                continue
            tensors: dict[str, Tensor] = {}
            part = prompts[number * PART : (number + 1) * PART]
            for batch in _batches(range(len(part)), batch_size):
                encoded = teacher.encode_prompts([part[i] for i in batch]).tensors
                tensors |= {f"{i}/{name}": _trimmed(e[j]) for name, e in encoded.items() for j, i in enumerate(batch)}
                if batch[0] == 0:
                    size = sum(tensor.nbytes for tensor in tensors.values()) / len(batch)
                    _check_space(folder, size * (count - len(found) * PART), count)
                bar.update(len(batch))
            shapes = json.dumps({name: list(tensor.shape[1:]) for name, tensor in encoded.items()})
            found[number] = write_part(folder, number, tensors, {"shapes": shapes})


def _batches(prompts: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (prompts[start : start + size] for start in range(0, len(prompts), size))


def _trimmed(row: Tensor) -> Tensor:
    """A copy without the zeros in which the first dimension ends."""
    if row.ndim == 0:
        return row.cpu().clone()
    filled = row.flatten(1).any(1) if row.ndim > 1 else row != 0
    return row[: int(filled.nonzero().max()) + 1 if filled.any() else 0].cpu().clone()


def _check_space(folder: Path, size: float, count: int) -> None:
    """Raises OSError if so many bytes do not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{count:,} prompts take about {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free")
