"""A run's checkpoints as folders: recorded, listed, put in place, rotated, and set aside."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..folders import digest_of_file, sync
from ..untrusted import digest_of

PREFIX, PARTIAL, OLD, REPLACED = "checkpoint-", ".partial-", ".old-", ".replaced"
BEST = f"{PREFIX}best"  # the checkpoint that is best by --metric_for_best_model; no other place lists it
RECORD, DIGEST = "state.json", "digest"
OF_PIECES = r"(-\d+-of-\d+)?"  # after the name of a part that is cut into pieces
SET_ASIDE = "set-aside-from-"  # + checkpoint-N: the folder of newer checkpoints, after a run went back to N
KEYS_OF_0_1_0 = {"update", "digests", "scalars", "monitor", "arguments"}  # whose records have no digest


def write_record(checkpoint: Path, record: dict[str, Any]) -> None:
    """Writes `state.json`, with a digest of its contents, and waits until it is on the disk."""
    path = checkpoint / RECORD
    path.write_text(json.dumps({**record, DIGEST: digest_of(record)}, indent=1))
    sync(path)


def read_record(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` holds: `update`, `digests`, `scalars`, `monitor` and the run's `arguments`.

    Raises:
        ValueError: if it is not as it was written.
        OSError: if it cannot be read.
    """
    record: Any = json.loads((checkpoint / RECORD).read_text("utf-8"))
    if not isinstance(record, dict) or not record.keys() >= KEYS_OF_0_1_0:
        raise ValueError(f"{RECORD} is no record of a checkpoint")
    digest = record.pop(DIGEST, None)
    if digest is None and record.keys() == KEYS_OF_0_1_0:
        return record
    if digest != digest_of(record):
        raise ValueError(f"{RECORD} changed since it was written")
    return record


def files_of(checkpoint: Path, part: str) -> list[Path]:
    """The file of a part, such as `student` or `ema`, or its pieces; an empty list if the record names none."""
    names = [
        name for name in read_record(checkpoint)["digests"] if re.fullmatch(rf"{part}{OF_PIECES}\.safetensors", name)
    ]
    return [checkpoint / name for name in names]


def read_part(checkpoint: Path, part: str) -> dict[str, Tensor]:
    """A part's tensors, on the CPU; FileNotFoundError if the checkpoint does not have it."""
    files = files_of(checkpoint, part)
    if not files:
        raise FileNotFoundError(f"it has no {part}")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if they are as they were written."""
    try:
        digests = read_record(checkpoint)["digests"]
        changed = [name for name, digest in digests.items() if digest_of_file(checkpoint / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(changed)} changed since it was written" if changed else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; not `checkpoint-best`, nor a user's copies of them.

    One that a kill left beside its place (see `put_in_place`) is among them.
    """
    return [path for path in _folders(folder) if (path / RECORD).exists()]


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders by name alone, whatever they hold."""
    paths = sorted(folder.glob(f"{PREFIX}*"), key=lambda path: path.name.endswith(REPLACED), reverse=True)
    found = {_number(path): path for path in paths}  # where there are both, the one in its place
    found.pop(None, None)
    return [found[number] for number in sorted(found, key=lambda number: number or 0)]


def name_of(checkpoint: Path) -> str:
    """A checkpoint's name, wherever a kill left it."""
    return checkpoint.name.removesuffix(REPLACED)


def _number(path: Path) -> int | None:
    """The update in a checkpoint's name."""
    number = name_of(path).removeprefix(PREFIX)
    return int(number) if number.isdecimal() else None


def find_checkpoint(folder: Path, name: str) -> Path:
    """The checkpoint that `--resume_from_checkpoint` names: `latest`, a name in `folder`, or a path.

    `latest` is the last that was written, as a run that goes back sets newer ones aside. It passes over damaged ones,
    with a warning. Nothing is changed.

    Raises:
        ValueError: if there is none, or the one that was named is damaged.
    """
    if name == "latest":
        return _newest_whole(folder)
    for path in (folder / name, folder / f"{name}{REPLACED}", Path(name)):
        if (path / RECORD).exists():
            problem = damage(path)
            if problem:
                raise ValueError(f"{path} is damaged ({problem}); resume from an earlier checkpoint, or from `latest`.")
            return path
    raise ValueError(f"--resume_from_checkpoint {name} is no checkpoint; use `latest` or a checkpoint-N folder.")


def _newest_whole(folder: Path) -> Path:
    found = _folders(folder)
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(f"{path} is damaged ({problem}); the checkpoint before it is used.", stacklevel=3)
    what = "undamaged checkpoint" if found else "checkpoint"
    raise ValueError(f"There is no {what} in {folder} to resume from; leave --resume_from_checkpoint out.")


def put_in_place(partial: Path, target: Path) -> None:
    """Gives a finished checkpoint its name; one that has it already is removed only afterwards."""
    replaced = target.with_name(target.name + REPLACED)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    sync(target.parent)
    if replaced.exists():
        remove(replaced)


def tidy(folder: Path) -> None:
    """Puts back what a killed run had moved to replace it, and removes what it left half written or half removed."""
    for replaced in folder.glob(f"{PREFIX}*{REPLACED}"):
        target = replaced.with_name(name_of(replaced))
        if target.exists():
            remove(replaced)
        else:
            replaced.rename(target)
    for left in [*folder.glob(f"{PARTIAL}*"), *folder.glob(f"{OLD}*")]:
        shutil.rmtree(left, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Hides a checkpoint before its files go, so that none is ever seen half removed."""
    hidden = checkpoint.with_name(OLD + checkpoint.name)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # network drives keep what another process reads; `tidy` comes again


def rotate(written: Path, keep: int | None) -> None:
    """Removes the oldest checkpoints beyond `keep`, and never the one that was just written; all stay with None."""
    if keep is not None:
        others = [path for path in list_checkpoints(written.parent) if path != written]
        for old in others[: max(len(others) - max(keep - 1, 0), 0)]:
            remove(old)


def set_newer_aside(folder: Path, checkpoint: Path) -> Path | None:
    """Moves the run's checkpoints that are newer than the one it resumes from out of its way; nothing is deleted.

    The newest goes first, so that a kill leaves a history without a gap; what it left is moved the next time.

    Args:
        folder: the run's.
        checkpoint: the one that it resumes from, there or elsewhere.

    Returns:
        Where they are now; None if there were none.
    """
    origin = read_record(checkpoint)
    best = folder / BEST
    others = [best] if (best / RECORD).exists() and not best.samefile(checkpoint) else []
    newer = [path for path in [*_folders(folder), *others] if _is_newer(path, origin)]
    if not newer:
        return None
    first = place = folder / f"{SET_ASIDE}{PREFIX}{origin['update']}"
    number = 1
    while any((place / path.name).exists() for path in newer):
        number += 1
        place = first.with_name(f"{first.name}-{number}")
    place.mkdir(exist_ok=True)
    for path in reversed(newer):
        path.rename(place / path.name)
    sync(place)
    sync(folder)
    return place


def _is_newer(path: Path, origin: dict[str, Any]) -> bool:
    """Whether a checkpoint is of a later update, or of the same one in another run."""
    try:
        number = _number(path)
        number = read_record(path)["update"] if number is None else number
        if number != origin["update"]:
            return bool(number > origin["update"])
        return bool(read_record(path)["digests"] != origin["digests"])
    except (OSError, ValueError):
        return True
