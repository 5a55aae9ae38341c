"""The scenes of the fault campaign, and the comparison of folders by their contents, read without our code."""

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
        prepare: fills an empty folder with the files before the work.
        act: the work, in that folder.
        judge: reads the folder after a kill, continues the work, and gives the verdict.
        reference: makes what the judge compares with, once, before any trial.
        most: the highest number of moments that are tried, where a trial takes seconds.
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
        prepare: fills an empty folder.
        files: patterns, in the folder, of the files to damage.
        read: reads them as a user's command does.
        same: whether a result is as good as the undamaged one, given both and the damaged file's name.
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
    """The contents of a folder's files, by their paths in it: tensors, JSON, or bytes."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def content(path: Path) -> Any:
    """A file's content; the bytes of a file that cannot be read, which equal no whole file's content."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if path.suffix == ".json":
            return json.loads(path.read_text())
    except Exception:  # each library has errors of its own for a broken file
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
    """Whichever file is damaged, the result must be the same."""
    return equal(result, reference)
