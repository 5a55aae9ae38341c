"""A student takes the place of an older one: all of it or nothing, whenever the process is killed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..families import STUDENT_CONFIG
from ..folders import aside, clear_aside, sync, sync_tree

READY, REPLACED = "ready", "replaced"  # in the hidden folder: the whole new student, and what it replaces
FINDINGS = ("samples.png", "pictures", "metrics.json", "evaluation.json")  # of the older student, not of this one


class WritingError(OSError):
    """A student could not be written; the system's own error is its cause."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Says in one sentence what to do where a student cannot be written.

    Raises:
        WritingError: for example on a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WritingError(
            f"The student could not be written to {folder} ({error}); its checkpoints are intact. Free some space and "
            "resume with --resume_from_checkpoint latest, which trains what is left and writes it again."
        ) from error


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder of the same name, whose contents become those of `folder` at the end.

    They are written aside and synced. An older student stays whole until then; what else is in the folder stays. A kill
    while they are moved leaves a folder that is no student, and all of the new one in a hidden folder, from which
    `finish_exports` goes on.

    Args:
        folder: an existing one.

    Raises:
        WritingError: for example on a full disk; the older student is untouched then.
    """
    with writing(folder):
        finish_exports(folder)
        with aside(folder) as hidden:
            new = hidden / "new" / (folder.resolve().name or "student")  # which files are named after
            new.mkdir(parents=True)
            yield new
            sync_tree(new)
            new.rename(hidden / READY)
            try:
                _put(hidden, folder)
            except BaseException:  # as Ctrl-C raises it
                _put(hidden, folder)
                raise


def finish_exports(folder: Path) -> None:
    """Completes what killed processes had begun to put into a folder, and removes what they left half written."""
    clear_aside(folder, lambda hidden: _put(hidden, folder))


def _put(hidden: Path, folder: Path) -> None:
    """Moves a whole student into its place, from wherever a kill stopped that."""
    ready, replaced = hidden / READY, hidden / REPLACED
    if not (ready / STUDENT_CONFIG).exists():  # it goes last
        return
    replaced.mkdir(exist_ok=True)
    for name in (STUDENT_CONFIG, *FINDINGS):  # first of all, so that a mixture is no student
        _move(folder / name, replaced)
    for path in sorted(ready.iterdir(), key=lambda path: path.name == STUDENT_CONFIG):
        _move(folder / path.name, replaced)
        path.rename(folder / path.name)
    sync(folder)


def _move(path: Path, place: Path) -> None:
    """Takes what is of the older student out of the way, if there is any."""
    if path.is_symlink() or path.exists():
        target = place / path.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        path.replace(target)
