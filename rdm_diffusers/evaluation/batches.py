"""What is noted of each drawn batch, beside the pictures: its speed, and the digests of its files.

A process appends a line a batch to its own `speed-N.jsonl`. So a picture that was changed later is noticed, and a line
that was cut short by a kill or damaged later is left out.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .digests import digest_of_files
from .sealing import sealed, unsealed


def note_batch(folder: Path, process: int, files: Sequence[Path], seconds: float) -> None:
    """Appends what is known of a batch that has just been drawn.

    Raises:
        OSError: if it cannot be written.
    """
    digests = {file.name: digest_of_files([file]) for file in files}
    line = json.dumps(sealed({"images": len(files), "seconds": seconds, "files": digests}))
    path = folder / f"speed-{process}.jsonl"
    cut = path.exists() and not path.read_bytes().endswith(b"\n")  # the process was killed as it wrote
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + line + "\n")


def read_batches_of(folder: Path) -> list[list[dict[str, Any] | None]]:
    """The notes of each process in their order; None for one that is damaged, which a warning says."""
    processes = []
    for path in sorted(folder.glob("speed-*.jsonl")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            lines = [f"{path.name} cannot be read: {error.strerror}"]
        notes = [_note(line) for line in lines if line.strip()]
        if None in notes:
            warnings.warn(
                f"{path} is damaged in line {notes.index(None) + 1}; what it says of the speed is left out.",
                stacklevel=3,
            )
        processes.append(notes)
    return processes


def digests_of_drawn(folder: Path) -> dict[str, set[str]]:
    """For pictures by name the digests that they had when they were drawn; nothing for those of version 0.1.0."""
    known: dict[str, set[str]] = {}
    for notes in read_batches_of(folder):
        for note in notes:
            for name, digest in (note or {}).get("files", {}).items():
                known.setdefault(name, set()).add(digest)
    return known


def images_per_second(folder: Path) -> float | None:
    """Pictures a second of one process, decoding included; of each process's first batch of many, nothing is counted.

    Returns:
        None where no speed was noted.
    """
    counted: list[dict[str, Any] | None] = []
    for notes in read_batches_of(folder):
        counted += notes[1:] if len(notes) > 1 else notes
    whole = [note for note in counted if note is not None]
    seconds = sum(note["seconds"] for note in whole)
    return sum(note["images"] for note in whole) / seconds if seconds else None


def _note(line: str) -> dict[str, Any] | None:
    try:
        note = unsealed(line)
    except ValueError:
        return None
    known = note.keys() in ({"images", "seconds"}, {"images", "seconds", "files"})
    return note if known and _is_number(note, "images") and _is_number(note, "seconds") else None


def _is_number(note: Mapping[str, Any], name: str) -> bool:
    value = note[name]
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
