"""SHA-256 digests of prompt sets, networks and files, and JSON records that hold a digest of themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..untrusted import digest_of, parse_object

SAMPLED = 1024  # how many numbers of each tensor identify a network
OWN_DIGEST = "sha256"  # a record's entry


def digest_of_texts(texts: Sequence[str]) -> str:
    """SHA-256 of texts in their order."""
    parts = (text.encode(errors="surrogatepass") for text in texts)
    return _digest(len(part).to_bytes(8) + part for part in parts)


def digest_of_tensors(tensors: Mapping[str, Tensor], most: int | None = None) -> str:
    """SHA-256 of names, shapes, dtypes and numbers; the file format does not matter.

    Args:
        tensors: by name, for example a `state_dict`.
        most: how many evenly spaced numbers of each tensor are read, at least 2; all by default.
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


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as JSON returns it, with the digest of its contents."""
    plain = json.loads(json.dumps(record))
    return {**plain, OWN_DIGEST: digest_of(plain)}


def unsealed(text: str) -> dict[str, Any]:
    """The record in a JSON text, without its digest; records of version 0.1.0 have none.

    Raises:
        ValueError: if the text is no JSON object, or was changed since it was written.
    """
    record = parse_object(text)
    digest = record.pop(OWN_DIGEST, None)
    if digest is not None and digest != digest_of(record):
        raise ValueError("it was changed since it was written")
    return record
