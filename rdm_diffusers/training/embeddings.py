"""Prompt embeddings: encoded once, cached on disk, and never read once damaged."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Array2D, Dataset, Features, Sequence as Row, Value
from torch import Tensor

from ..families import Teacher
from ..folders import digest_of_file, locked

FOLDER, SUFFIX = "rdm_embeddings", ".arrow"


def embed_prompts(
    teacher: Teacher, prompts: Sequence[str], cache_dir: str | None, fingerprint: str, batch_size: int = 8
) -> Dataset:
    """Encodes the N prompts with the teacher's text encoders, or reads what an earlier run cached.

    A cache is one file, named by its fingerprint and by the digest of its contents. It is written as a whole or not at
    all; a damaged one is made anew. Of several processes that need it, one makes it. It is in `cache_dir`, by default
    that of `datasets`.

    Returns:
        A memory-mapped dataset of N rows with a column for each tensor of the family's conditioning.

    Raises:
        OSError: if the cache cannot be written; nothing is left of it then.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = _whole(folder, fingerprint)
        if found is None:
            with locked(folder / f"{fingerprint}.lock", wait=True):
                found = _whole(folder, fingerprint) or _make(folder, fingerprint, teacher, prompts, batch_size)
        return Dataset.from_file(str(found)).with_format("torch")
    except OSError as error:
        raise OSError(
            f"The prompt embeddings could not be cached in {folder} ({error}); free some space there, or name another "
            "folder with --cache_dir."
        ) from error


def fingerprint_of(teacher: Teacher, prompts: Sequence[str]) -> str:
    """A digest of the prompts, of how they are read, and of the text encoders' weights."""
    digest = hashlib.sha256(repr((list(prompts), teacher.options)).encode())
    for encoder in teacher.text_encoders:
        for parameter in encoder.parameters():
            digest.update(repr((str(parameter.dtype), parameter.double().sum().item())).encode())
    return digest.hexdigest()[:32]


def _whole(folder: Path, fingerprint: str) -> Path | None:
    """The cache whose contents match the digest in its name, if there is one."""
    return next((path for path in _caches(folder, fingerprint) if path.stem.endswith(f"-{_digest(path)}")), None)


def _caches(folder: Path, fingerprint: str) -> list[Path]:
    """All caches: whole, damaged, and those of version 0.1.0, which have no digests."""
    return sorted(folder.glob(f"{fingerprint}*{SUFFIX}"))


def _digest(path: Path) -> str:
    try:
        return digest_of_file(path)[:32]
    except OSError:
        return "unreadable"


def _make(folder: Path, fingerprint: str, teacher: Teacher, prompts: Sequence[str], batch_size: int) -> Path:
    """Makes the cache aside, puts it in its place, and removes those that cannot be used."""
    useless = _caches(folder, fingerprint)
    if useless:
        warnings.warn(
            f"The cached prompt embeddings {useless[0]} are damaged or of an older version; they are made anew.",
            stacklevel=4,
        )
    partial = folder / f".partial-{fingerprint}"
    shutil.rmtree(partial, ignore_errors=True)  # a killed process's
    try:
        partial.mkdir()
        _encode(partial / f"embeddings{SUFFIX}", fingerprint, teacher, prompts, batch_size)
        target = folder / f"{fingerprint}-{_digest(partial / f'embeddings{SUFFIX}')}{SUFFIX}"
        (partial / f"embeddings{SUFFIX}").replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for path in useless:
        if path != target:
            path.unlink(missing_ok=True)
    return target


def _encode(path: Path, fingerprint: str, teacher: Teacher, prompts: Sequence[str], batch_size: int) -> None:
    """Writes the embeddings, one row per prompt."""

    def encode(batch: dict[str, list[str]]) -> dict[str, np.ndarray]:
        conditioning = teacher.encode_prompts(batch["prompt"])
        return {name: _storable(tensor).cpu().numpy() for name, tensor in conditioning.tensors.items()}

    example = teacher.encode_prompts(prompts[:1])
    features = Features({name: _feature(_storable(tensor)[0]) for name, tensor in example.tensors.items()})
    datasets.disable_progress_bars()
    Dataset.from_dict({"prompt": list(prompts)}).map(
        encode,
        batched=True,
        batch_size=batch_size,
        remove_columns=["prompt"],
        features=features,
        new_fingerprint=fingerprint,
        cache_file_name=str(path),
    )


def _storable(tensor: Tensor) -> Tensor:
    """bfloat16, which the cache's format lacks, widened to float32."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _feature(row: Tensor) -> Any:
    dtype = str(row.dtype).removeprefix("torch.")
    if row.ndim == 2:
        return Array2D(shape=tuple(row.shape), dtype=dtype)
    return Row(Value(dtype), length=len(row))
