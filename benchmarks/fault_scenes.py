"""What a scene of the fault campaign is, and how folders are compared: by what they hold, read without our code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fault_damage import DAMAGES
from fault_trials import Verdict
from safetensors import safe_open

EVERY = tuple(DAMAGES)


@dataclass(frozen=True)
class KillScene:
    """Work that is killed at any of its file operations.

    Args:
        name: of the scene.
        prepare: fills an empty folder with what is there before.
        act: the work, in that folder.
        judge: looks at the folder after a kill, carries on, and says what became of it all.
        reference: makes what the judge compares with, once, before any trial.
        most: how many of its moments are tried unless more trials are asked for, where a trial takes seconds.
    """

    name: str
    prepare: Callable[[Path], None]
    act: Callable[[Path], Any]
    judge: Callable[[Path], Verdict]
    reference: Callable[[], Any] = lambda: None
    most: int | None = None


@dataclass(frozen=True)
class DamageScene:
    """Files that are damaged, and a command that reads them.

    Args:
        name: of the scene.
        prepare: fills an empty folder; returns what `read` gives while nothing is damaged.
        files: patterns, in the folder, of the files to damage.
        read: reads them as a user's command does.
        same: whether a result is the undamaged one, given the result, the undamaged one and the damaged file's name.
        kinds: of damage.
        other: another's folder, prepared too, whose files of the same names are swapped in; else a sibling of the file.
        rounds: how often each file meets each kind of damage.
    """

    name: str
    prepare: Callable[[Path], None]
    files: Sequence[str]
    read: Callable[[Path], Any]
    same: Callable[[Any, Any, str], bool]
    kinds: Sequence[str] = EVERY
    other: str | None = None
    rounds: int = 1


def contents(folder: Path) -> dict[str, Any]:
    """All that a folder's files hold, by their names in it: tensors, JSON, or bytes."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def content(path: Path) -> Any:
    """A file's; what cannot be read is its bytes, which equal no whole file's."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if path.suffix == ".json":
            return json.loads(path.read_text())
    except Exception:  # whatever a library says of a broken file
        return path.read_bytes()
    return path.read_bytes()


def equal(a: Any, b: Any) -> bool:
    """Whether two nested things are the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def hidden(folder: Path) -> set[str]:
    """The hidden files and folders in a folder, at any depth."""
    return {str(path.relative_to(folder)) for path in folder.rglob(".*")}


def same_result(result: Any, reference: Any, damaged: str) -> bool:
    """Whatever was damaged, only the very same result will do."""
    return equal(result, reference)
