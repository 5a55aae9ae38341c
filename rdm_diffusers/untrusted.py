"""Files and text from others: links that stay in their folder, JSON within limits, and text without secrets."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .folders import write_whole

MAX_BYTES = 16 * 2**20  # of a JSON file; the largest of ours, with ten thousand prompts, has 1 MiB
MAX_DEPTH = 32
MAX_WHOLE = 2**64
NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a whole number",
         float: "a number", type(None): "null"}  # fmt: skip
Kinds = type | tuple[type, ...]

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
ADDRESS = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]{0,20}://[^\s'\"`<>]+")
LOGIN = re.compile(r"(?<=://)[^/?#@]*(?:@[^/?#@]*)*@")  # `user:password@`; a password may contain an @
SECRET = re.compile(
    r"(?<=[?&#;])(?:[\w.-]*[_.-])?"
    r"(?:token|passw(?:or)?d|pwd|secret|key|apikey|sig|signature|credential|auth|authorization|jwt)=[^&#;]*[&;]?",
    re.IGNORECASE,
)
INSTEAD = "leave it out, and log in with `hf auth login` or set HF_TOKEN"


def without_secrets(text: str) -> str:
    """A text without Hub tokens, and without the users, passwords and tokens in its addresses."""
    return TOKEN.sub("...", ADDRESS.sub(lambda address: SECRET.sub("", LOGIN.sub("", address[0])), text))


def has_secret(text: str) -> bool:
    """Whether `without_secrets` would remove anything."""
    return without_secrets(text) != text


def real_path(folder: Path, path: Path, writing: bool = False) -> Path:
    """Follows all links of a path in a folder; use the result from then on, because a link may change.

    The folder itself and the folders above it may be links. A link may be broken.

    Args:
        folder: what the path must not leave. The blobs of a snapshot in the Hub's cache belong to it.
        path: in the folder.
        writing: whether it will be written to, which blobs must not be.

    Raises:
        ValueError: naming the link and its target, if the path leaves the folder or leads to itself.
    """
    root = folder.resolve()
    allowed = [root, *([] if writing else _blobs_of(root))]
    real = _resolved(path)
    if not _is_in(allowed, real):
        parts = path.relative_to(folder).parts
        steps = (folder.joinpath(*parts[: i + 1]) for i in range(len(parts)))
        link = next(step for step in steps if not _is_in(allowed, _resolved(step)))
        raise ValueError(
            f"{link} is a link to {os.readlink(link)}, which is not in {folder}; replace it by what it stands for, or "
            "remove it."
        )
    return real


def write_inside(folder: Path, name: str, text: str) -> Path:
    """Writes a UTF-8 text file in a folder, whole or not at all, and never through a link that leaves the folder.

    Returns:
        The file's path in the folder.

    Raises:
        ValueError: as `real_path`.
    """
    write_whole(real_path(folder, folder / name, writing=True), text)
    return folder / name


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (RuntimeError, OSError) as error:  # a circle; the class depends on the release of Python
        raise ValueError(f"{path} is a link that leads to itself; remove it.") from error


def _is_in(allowed: list[Path], real: Path) -> bool:
    return any(real.is_relative_to(place) for place in allowed)


def _blobs_of(root: Path) -> list[Path]:
    """Where the Hub's cache keeps the files of a snapshot, or of a folder in a snapshot."""
    for place in [root, *root.parents]:
        repository = place.parent.parent
        if place.parent.name == "snapshots" and repository.name.startswith("models--"):
            return [repository / "blobs", repository.parent / "blobs"]
    return []


def read_object(path: Path, remedy: str, finite: bool = True) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        path: of the file.
        remedy: what to do if it cannot be used, for the end of the error's sentence.
        finite: as in `parse_object`.

    Raises:
        ValueError: in one sentence, if the file is missing or no regular file, or as `parse_object`.
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
    """Parses a JSON object.

    Args:
        text: the JSON.
        finite: whether all numbers must be finite; diffusers' schedulers have an infinite setting.

    Raises:
        ValueError: if it is no JSON object, is nested more than `MAX_DEPTH` deep, or holds a whole number of more than
            64 bits or text that UTF-8 cannot encode.
    """
    try:
        parsed = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"it holds {_kind_of(parsed)} instead of an object")
    for value in _values(parsed):
        if finite and isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"it holds {value}, which is not finite")
        if isinstance(value, int) and abs(value) > MAX_WHOLE:
            raise ValueError("it holds a whole number of more than 64 bits")
        if isinstance(value, str):
            value.encode()  # fails for half of a surrogate pair
    return parsed


def _values(parsed: Any) -> Iterator[Any]:
    """All keys, numbers and texts, without recursion, whose own limit depends on the caller."""
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


def digest_of(record: Any) -> str:
    """The SHA-256 of what a JSON value says, whatever the order of its keys, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def check_kinds(entries: Mapping[str, Any], kinds: Mapping[str, Kinds], inside: str = "") -> None:
    """Refuses entries of a JSON object that have another type than expected; missing and unknown ones are not checked.

    Args:
        entries: the object.
        kinds: the types of each entry, as for `is_kind`.
        inside: what the object is called, for the error.

    Raises:
        ValueError: naming the first such entry and its expected type.
    """
    for name, kind in kinds.items():
        if name in entries and not is_kind(entries[name], kind):
            allowed = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(NAMES[one] for one in allowed)
            raise ValueError(f"{inside}{name} is {_kind_of(entries[name])} instead of {wanted}")


def is_kind(value: Any, kind: Kinds) -> bool:
    """`isinstance`, but `true` is no number, a whole number is also a `float`, and NaN and infinity are no numbers."""
    allowed = kind if isinstance(kind, tuple) else (kind,)
    if type(value) is float and not math.isfinite(value):
        return False
    return type(value) in allowed or (type(value) is int and float in allowed)


def _kind_of(value: Any) -> str:
    if type(value) is float and not math.isfinite(value):
        return str(value)
    return NAMES.get(type(value), type(value).__name__)


def described(error: BaseException) -> str:
    """An error's class and first line, for the middle of a sentence; of a plain ValueError only the line."""
    said = (str(error).splitlines() or [""])[0].rstrip(".")
    return said if type(error) is ValueError else f"{type(error).__name__}: {said}"
