"""JSON out of files that others may have written: small, flat, finite, and of the types that are expected."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20  # the largest of ours, with ten thousand prompts, has one
MAX_DEPTH = 32
MAX_WHOLE = 2**64
NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a whole number",
         float: "a number", type(None): "null"}  # fmt: skip
Kinds = type | tuple[type, ...]


def read_object(path: Path, remedy: str, finite: bool = True) -> dict[str, Any]:
    """A file of one JSON object.

    Args:
        path: of the file.
        remedy: what to do where it cannot be used, for the end of the error's sentence.
        finite: as in `parse_object`.

    Raises:
        ValueError: one sentence, if it is missing, no regular file, or as `parse_object`.
    """
    try:
        if not path.is_file():
            raise ValueError("it is missing, or no file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        return parse_object(path.read_bytes(), finite)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({described(error)}); {remedy}.") from error


def parse_object(text: str | bytes, finite: bool = True) -> dict[str, Any]:
    """A JSON object.

    Args:
        text: the JSON.
        finite: whether all numbers must be; diffusers' schedulers have an infinite setting.

    Raises:
        ValueError: if it is no JSON, no object, nested more than `MAX_DEPTH` deep, or holds a number beyond all use, or
            text that no file can hold.
    """
    try:
        parsed = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"it holds {kind_of(parsed)} instead of an object")
    for value in _values(parsed):
        if finite and isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"it holds {value}, which is not finite")
        if isinstance(value, int) and abs(value) > MAX_WHOLE:
            raise ValueError("it holds a whole number of more than 64 bits")
        if isinstance(value, str):
            value.encode()  # half of a surrogate pair cannot be
    return parsed


def digest_of(record: Any) -> str:
    """SHA-256 of what JSON says, in hexadecimal digits; not of how it is written."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _values(parsed: Any) -> Iterator[Any]:
    """All keys, numbers and texts; not by recursion, which has a limit of its own."""
    waiting = [(parsed, 1)]
    while waiting:
        value, depth = waiting.pop()
        if not isinstance(value, dict | list):
            yield value
            continue
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        waiting += [(one, depth + 1) for one in inner]


def check_kinds(entries: Mapping[str, Any], kinds: Mapping[str, Kinds], inside: str = "") -> None:
    """Refuses entries of another type than is expected; those that are missing or not known are passed over.

    Args:
        entries: a JSON object.
        kinds: what each may be; a whole number is a number, `true` is none.
        inside: what the object is called, for the error.

    Raises:
        ValueError: naming the first, and what it should be.
    """
    for name, kind in kinds.items():
        if name in entries and not is_kind(entries[name], kind):
            allowed = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(NAMES[one] for one in allowed)
            raise ValueError(f"{inside}{name} is {kind_of(entries[name])} instead of {wanted}")


def is_kind(value: Any, kind: Kinds) -> bool:
    """As isinstance, but `true` is no number, a whole number is a number, and what is not finite is none."""
    allowed = kind if isinstance(kind, tuple) else (kind,)
    if type(value) is float and not math.isfinite(value):
        return False
    return type(value) in allowed or (type(value) is int and float in allowed)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if type(value) is float and not math.isfinite(value):
        return str(value)
    return NAMES.get(type(value), type(value).__name__)


def described(error: BaseException) -> str:
    """An error's kind and first line, for the middle of a sentence; of our own only what it says."""
    said = (str(error).splitlines() or [""])[0].rstrip(".")
    return said if type(error) is ValueError else f"{type(error).__name__}: {said}"
