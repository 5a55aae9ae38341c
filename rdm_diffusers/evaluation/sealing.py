"""JSON that says whether it was changed: each record holds the digest of all else that is in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..json_files import parse_object

SEAL = "sha256"


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record, as JSON gives it back, with the digest of its contents."""
    plain = json.loads(json.dumps(record))
    return {**plain, SEAL: _digest(plain)}


def unsealed(text: str) -> dict[str, Any]:
    """The record that JSON holds, without its digest; version 0.1.0 wrote none.

    Raises:
        ValueError: if it is no JSON of a record, or if it was changed.
    """
    record = parse_object(text)
    seal = record.pop(SEAL, None)
    if seal is not None and seal != _digest(record):
        raise ValueError("it was changed since it was written")
    return record


def write_whole(path: Path, content: str) -> None:
    """Writes a text that is there as a whole or not at all; what was there before stays until then."""
    aside = aside_of(path)
    aside.write_text(content, encoding="utf-8")
    aside.replace(path)


def aside_of(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".partial-{path.name}")


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
