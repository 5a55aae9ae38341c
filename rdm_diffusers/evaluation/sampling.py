"""Draws pictures into a folder: in any number of processes, and after an interruption only those that are missing.

A picture depends on its prompt and its seed only, and its seed is the first seed plus its number. A network's rounding
also depends on what else is in the batch; so batches are always cut at the same places, a process takes whole batches
in turn, and one that was interrupted is drawn again as a whole, though nothing that is there is written again. What was
damaged since it was drawn is noticed before anything is drawn, and drawn again.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from ..folders import write_whole
from .batches import digests_of_drawn, note_batch
from .digests import digest_of_files, digest_of_texts
from .image_files import damaged, save_image
from .prompt_sets import prompts_for
from .sealing import sealed, unsealed
from .subjects import Subject

RECORD, ASIDE = "images.json", ".process-"
FREE = {"name"}  # where a network lies does not matter


@dataclass(frozen=True)
class Plan:
    """Which pictures are drawn, and where they go.

    Args:
        folder: the output folder; pictures go into `images/`.
        prompts: the whole set; picture i is drawn for number i of it, modulo its length.
        num_images: how many.
        first_seed: of picture 0.
    """

    folder: Path
    prompts: Sequence[str]
    num_images: int
    first_seed: int

    def file(self, index: int) -> Path:
        """Where picture `index` goes."""
        return self.folder / "images" / f"{index:06d}.png"

    @property
    def files(self) -> list[Path]:
        """All of them."""
        return [self.file(i) for i in range(self.num_images)]

    def unfinished(self, batch_size: int, process: int, processes: int) -> list[range]:
        """The batches of one process that lack a picture."""
        starts = range(process * batch_size, self.num_images, processes * batch_size)
        batches = [range(start, min(start + batch_size, self.num_images)) for start in starts]
        return [batch for batch in batches if not all(self.file(i).exists() for i in batch)]


@contextmanager
def drawing_alone(folder: Path) -> Iterator[None]:
    """Holds a folder until the end, or until the process is dead; where a file system has no locks, nothing.

    Raises:
        ValueError: if another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(f"Another rdm-evaluate draws into {folder}; wait for it, or choose another folder.") from error
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def draw(plan: Plan, subject: Subject, state: PartialState) -> None:
    """Draws what is missing or damaged; returns in every process when all have finished.

    Raises:
        ValueError: if the folder holds pictures of other settings, if another evaluation draws into it, if a picture is
            not finite, or if not all arrived.
    """
    if not state.is_main_process:
        _draw(plan, subject, state)
        return
    images = plan.folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    with drawing_alone(images):
        check_record(plan, subject.record)
        for left in images.glob(f"{ASIDE}*"):  # by a killed process
            left.unlink()
        remove_damaged(plan)
        _draw(plan, subject, state)


def remove_damaged(plan: Plan) -> None:
    """Removes those pictures that changed since they were drawn, so that they are drawn again."""
    there = [file for file in plan.files if file.exists()]
    useless = damaged(there) | dict.fromkeys(changed(there), "")
    if useless:
        warnings.warn(
            f"{len(useless)} pictures in {plan.folder} are damaged, the first is {min(useless).name}; they are drawn "
            "again.",
            stacklevel=2,
        )
    for file in useless:
        file.unlink()


def changed(files: Sequence[Path]) -> list[Path]:
    """Those of the drawn pictures that have not the digest that was noted beside their folder."""
    known = digests_of_drawn(beside(files[0].parent)) if files else {}
    return [file for file in files if file.name in known and digest_of_files([file]) not in known[file.name]]


def beside(images: Path) -> Path:
    """The folder of a folder of pictures, even if that is the one where we are."""
    return Path(os.path.abspath(images)).parent


def _draw(plan: Plan, subject: Subject, state: PartialState) -> None:
    """A process's share; the first one comes when all is checked."""
    state.wait_for_everyone()
    batches = plan.unfinished(subject.sampler.batch_size, state.process_index, state.num_processes)
    with tqdm(total=sum(map(len, batches)), desc="drawn", unit="image", disable=not state.is_main_process) as bar:
        for batch in batches:
            _draw_batch(plan, subject, batch, state.process_index)
            bar.update(len(batch))
    state.wait_for_everyone()
    missing = sum(not file.exists() for file in plan.files)
    if missing:
        raise ValueError(f"{missing} pictures are missing in {plan.folder}; give a folder that all processes share.")


def _draw_batch(plan: Plan, subject: Subject, batch: range, process: int) -> None:
    started = time.perf_counter()
    images, _ = subject.sampler(prompts_for(plan.prompts, batch), [plan.first_seed + i for i in batch])
    seconds = time.perf_counter() - started
    if not images.isfinite().all():
        raise ValueError(f"Pictures {batch.start} to {batch.stop - 1} are not finite; try --dtype float32 or bfloat16.")
    aside = plan.folder / "images" / f"{ASIDE}{process}.png"
    for i, image in zip(batch, images, strict=True):
        if not plan.file(i).exists():
            save_image(image, plan.file(i), aside)
    note_batch(plan.folder, process, [plan.file(i) for i in batch], seconds)


def check_record(plan: Plan, subject: Mapping[str, Any]) -> None:
    """Writes `images.json`, or makes sure that the pictures that are there were drawn with the same settings.

    Raises:
        ValueError: naming the settings that differ, or if nothing says which they were.
    """
    path = plan.folder / RECORD
    record = {**subject, "prompts_sha256": digest_of_texts(plan.prompts), "first_seed": plan.first_seed}
    record = json.loads(json.dumps(record))
    if path.exists():
        differences = differing(read_record(plan.folder), record)
        if differences:
            raise ValueError(
                f"{plan.folder} holds pictures of other settings ({'; '.join(differences)}); choose another "
                "--output_dir, or remove it."
            )
        return
    if any(file.exists() for file in plan.files):
        raise ValueError(
            f"{plan.folder} holds pictures without the {RECORD} that says what they are; choose another --output_dir, "
            "or remove it."
        )
    write_whole(path, json.dumps(sealed(record), indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """What `images.json` says of the pictures in `folder/images`; nothing where there is none.

    Raises:
        ValueError: if it is damaged.
    """
    path = folder / RECORD
    try:
        return unsealed(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {folder} and start again.") from error


def differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The entries that differ, in words."""
    keys = [key for key in dict.fromkeys([*was, *now]) if key not in FREE and was.get(key) != now.get(key)]
    return [f"{key} was {was.get(key)}, is {now.get(key)}" for key in keys]
