"""Digests: whether two prompt sets, networks or folders are the same, without keeping them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

SAMPLED = 1024  # numbers of each tensor that tell one network from another


def digest_of_texts(texts: Sequence[str]) -> str:
    """SHA-256 of texts in their order."""
    parts = (text.encode(errors="surrogatepass") for text in texts)
    return _digest(len(part).to_bytes(8) + part for part in parts)


def digest_of_tensors(tensors: Mapping[str, Tensor], most: int | None = None) -> str:
    """SHA-256 of names, shapes, dtypes and numbers, whatever file they came from.

    Args:
        tensors: by name, for example a `state_dict`.
        most: how many evenly spaced numbers of each tensor are read, at least 2; all of them by default.
    """

    def parts() -> Iterable[bytes]:
        for name in sorted(tensors):
            tensor = tensors[name].detach().flatten()
            if most is not None and len(tensor) > most:
                tensor = tensor[torch.arange(most, device=tensor.device) * (len(tensor) - 1) // (most - 1)]
            yield f"{name} {list(tensors[name].shape)} {tensor.dtype}".encode()
            yield tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()

    return _digest(parts())


def digest_of_files(files: Sequence[Path]) -> str:
    """SHA-256 of files' contents in their order; their names do not matter."""
    return _digest(hashlib.sha256(file.read_bytes()).digest() for file in files)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
