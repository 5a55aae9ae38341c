"""A new student replaces an older one as a whole or not at all, even if the process is killed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..families import STUDENT_CONFIG
from ..folders import aside, clear_aside, sync, sync_tree

READY, REPLACED = "ready", "replaced"  # in the hidden folder: the whole new student, and the files that it replaces
RESULTS = ("samples.png", "pictures", "metrics.json", "evaluation.json")  # they show the older student


class WritingError(OSError):
    """A student could not be written; the system's own error is its cause."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises WritingError, with what to do, if a student cannot be written, for example on a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WritingError(
            f"The student could not be written to {folder} ({error}); its checkpoints are intact. Free some space and "
            "resume with --resume_from_checkpoint latest, which finishes the training and writes it again."
        ) from error


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder of the same name, whose contents replace the student in `folder` at the end.

    They are written aside and synced; until then the older student stays whole. Other files in the folder stay. A kill
    while they are moved leaves a folder that is no student, and the whole new one in a hidden folder, from which
    `finish_exports` continues.

    Raises:
        WritingError: for example on a full disk; the older student is unchanged then.
    """
    with writing(folder):
        finish_exports(folder)
        with aside(folder) as hidden:
            new = hidden / "new" / (folder.resolve().name or "student")  # files are named after it
            new.mkdir(parents=True)
            yield new
            sync_tree(new)
            new.rename(hidden / READY)
            try:
                _move_in(hidden, folder)
            except BaseException:  # as Ctrl-C raises it
                _move_in(hidden, folder)
                raise


def finish_exports(folder: Path) -> None:
    """Completes the replacements that killed processes had begun, and removes what they left half written."""
    clear_aside(folder, lambda hidden: _move_in(hidden, folder))


def _move_in(hidden: Path, folder: Path) -> None:
    """Moves a whole student into its place, from wherever a kill stopped the move."""
    ready, replaced = hidden / READY, hidden / REPLACED
    if not (ready / STUDENT_CONFIG).exists():  # it goes last
        return
    replaced.mkdir(exist_ok=True)
    for name in (STUDENT_CONFIG, *RESULTS):  # first, so that a mixture is no student
        _move_out(folder / name, replaced)
    for path in sorted(ready.iterdir(), key=lambda path: path.name == STUDENT_CONFIG):
        _move_out(folder / path.name, replaced)
        path.rename(folder / path.name)
    sync(folder)


def _move_out(path: Path, replaced: Path) -> None:
    """Moves a file or folder of the older student away, if it exists."""
    if path.is_symlink() or path.exists():
        target = replaced / path.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        path.replace(target)
