"""Prompt embeddings: cached on the disk and never read once damaged, or encoded whenever they are needed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..families import Conditioning, Teacher
from ..folders import PARTIAL, digest_of_file, locked
from .devices import on_device

Embeddings = Callable[[Sequence[int]], Conditioning]  # the prompts' indices -> their embeddings, one row each
FOLDER, SUFFIX = "rdm_embeddings", ".embeddings"
OLD_SUFFIX = ".arrow"  # of version 0.1.0, whose caches were float32
HEADER = 4096  # bytes
PADDING = bytes(512)
PATIENCE = 5  # seconds of encoding after which its progress is shown


class CachedEmbeddings:
    """The embeddings of N prompts in a file, of which only the rows that are asked for are read.

    Calling it with B indices gives their `Conditioning` of length B on the CPU, in the dtypes of the text encoders. It
    raises OSError if the file cannot be read.

    The file begins with a JSON object, the dtype and shape of each tensor of one prompt, in `HEADER` bytes. The prompts
    follow, one after the other, each with the bytes of its tensors without the zeros that they end in. The last bytes
    say how many are left of each: N x tensors numbers of 64 bits.
    """

    def __init__(self, path: Path, count: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - open as long as the run
        layout = json.loads(self._file.read(HEADER))
        self._tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for name, (dtype, shape) in layout.items()
        }
        size = count * len(layout) * 8
        sizes = os.pread(self._file.fileno(), size, path.stat().st_size - size)
        self._sizes = np.frombuffer(sizes, np.int64).reshape(count, len(layout))
        self._ends = HEADER + self._sizes.sum(1).cumsum()

    def __del__(self) -> None:
        self._file.close()

    def __call__(self, indices: Sequence[int]) -> Conditioning:
        return Conditioning.cat([Conditioning(self._row(index)) for index in indices])

    def _row(self, index: int) -> dict[str, Tensor]:
        """The tensors of one prompt, `[1, ...]`."""
        sizes = self._sizes[index].tolist()
        content = os.pread(self._file.fileno(), sum(sizes), int(self._ends[index]) - sum(sizes))
        row, start = {}, 0
        for (name, like), size in zip(self._tensors.items(), sizes, strict=True):
            whole = bytearray(content[start : start + size].ljust(like.nbytes, b"\0"))
            row[name] = torch.frombuffer(whole, dtype=like.dtype).view(1, *like.shape)
            start += size
        return row


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

    A cache is one file, named by its fingerprint and by the digest of its contents. It is written as a whole or not at
    all; a damaged one is made anew. Of several processes that need it, one makes it, and the others wait. It is in
    `cache_dir`, by default that of `datasets`.

    Raises:
        OSError: if the cache cannot be written or does not fit on the disk; nothing is left of it then.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = _whole(folder, fingerprint)
        if found is None:
            with locked(folder / f"{fingerprint}.lock", wait=True) as held:
                for leftover in folder.glob(f"{PARTIAL}{fingerprint}*") if held else ():
                    leftover.unlink()  # a killed process's
                found = _whole(folder, fingerprint) or _make(folder, fingerprint, teacher, prompts, batch_size)
        return CachedEmbeddings(found, len(prompts))
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
            digest.update(repr((str(parameter.dtype), parameter.double().sum().item())).encode())
    return digest.hexdigest()[:32]


def _whole(folder: Path, fingerprint: str) -> Path | None:
    """The cache whose contents match the digest in its name, if there is one."""
    caches = sorted(folder.glob(f"{fingerprint}-*{SUFFIX}"))
    return next((path for path in caches if path.stem.endswith(f"-{_digest(path)}")), None)


def _digest(path: Path) -> str:
    try:
        return digest_of_file(path)[:32]
    except OSError:
        return "unreadable"


def _make(folder: Path, fingerprint: str, teacher: Teacher, prompts: Sequence[str], batch_size: int) -> Path:
    """Removes the caches that cannot be used, makes one aside, and puts it in its place."""
    useless = sorted(path for path in folder.glob(f"{fingerprint}*") if path.suffix in (SUFFIX, OLD_SUFFIX))
    if useless:
        warnings.warn(
            f"The cached prompt embeddings {useless[0]} are damaged or of an older version; they are made anew.",
            stacklevel=4,
        )
    for path in useless:
        path.unlink(missing_ok=True)
    partial = folder / f"{PARTIAL}{fingerprint}-{os.getpid()}"  # its own, where nothing can be locked
    try:
        digest = _write(partial, teacher, prompts, batch_size)
        return partial.replace(folder / f"{fingerprint}-{digest}{SUFFIX}")
    finally:
        partial.unlink(missing_ok=True)


def _write(path: Path, teacher: Teacher, prompts: Sequence[str], batch_size: int) -> str:
    """Writes the embeddings as `CachedEmbeddings` reads them; the digest of the file."""
    digest = hashlib.sha256()
    sizes: list[list[int]] = []
    with open(path, "wb") as file, tqdm(total=len(prompts), desc="encode", unit="prompt", delay=PATIENCE) as bar:
        for batch in _batches(prompts, batch_size):
            tensors = {name: tensor.cpu() for name, tensor in teacher.encode_prompts(batch).tensors.items()}
            rows = [[_stored(tensor[i]) for tensor in tensors.values()] for i in range(len(batch))]
            parts = [part for row in rows for part in row]
            if not sizes:
                _check_space(path.parent, len(prompts) * sum(map(len, parts)) // len(batch), len(prompts))
                parts.insert(0, _header(tensors))
            for part in parts:
                file.write(part)
                digest.update(part)
            sizes += [[len(part) for part in row] for row in rows]
            bar.update(len(batch))
        last = np.array(sizes, np.int64).tobytes()
        file.write(last)
        digest.update(last)
    return digest.hexdigest()[:32]


def _batches(prompts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (prompts[start : start + size] for start in range(0, len(prompts), size))


def _header(tensors: dict[str, Tensor]) -> bytes:
    layout = {name: (str(each.dtype).removeprefix("torch."), each.shape[1:]) for name, each in tensors.items()}
    return json.dumps(layout).encode().ljust(HEADER)


def _stored(row: Tensor) -> bytes:
    """The bytes of a tensor, without blocks of zeros at the end, such as the padding of a short prompt."""
    content = row.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    end = len(content)
    while content[max(end - len(PADDING), 0) : end] == PADDING:
        end -= len(PADDING)
    return content[:end]


def _check_space(folder: Path, size: int, count: int) -> None:
    """Raises OSError if so many bytes do not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{count:,} prompts take about {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free")
