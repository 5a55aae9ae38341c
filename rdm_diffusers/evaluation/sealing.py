"""JSON that says whether it was changed: each record holds the digest of all else that is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..json_files import digest_of, parse_object

SEAL = "sha256"


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record, as JSON gives it back, with the digest of its contents."""
    plain = json.loads(json.dumps(record))
    return {**plain, SEAL: digest_of(plain)}


def unsealed(text: str) -> dict[str, Any]:
    """The record that JSON holds, without its digest; version 0.1.0 wrote none.

    Raises:
        ValueError: if it is no JSON of a record, or if it was changed.
    """
    record = parse_object(text)
    seal = record.pop(SEAL, None)
    if seal is not None and seal != digest_of(record):
        raise ValueError("it was changed since it was written")
    return record
