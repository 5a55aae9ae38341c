"""Folders of pictures: drawn in any number of processes and resumed after an interruption, or given and checked.

A picture depends on its prompt and its seed only, and its seed is the first seed plus its index. Rounding in a network
also depends on the rest of the batch. So batches are always cut at the same places, each process takes whole batches in
turn, and an interrupted batch is drawn again as a whole, though no existing picture is overwritten. Each process logs
the seconds and the digests of its batches in its own `speed-N.jsonl`. Pictures that changed since are drawn again.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from ..folders import locked, write_whole
from .pictures import describe_pairs, list_images, pair, save_image, unreadable
from .prompt_sets import prompts_for
from .records import digest_of_files, digest_of_texts, sealed, unsealed
from .subjects import Sampler

RECORD, LOCK, ASIDE = "images.json", ".drawing.lock", ".process-"
FREE = {"name"}  # a network's place may change


@dataclass(frozen=True)
class Plan:
    """Which pictures are drawn into `folder/images`: picture i for prompt i modulo the number of prompts."""

    folder: Path
    prompts: Sequence[str]
    num_images: int
    first_seed: int  # of picture 0

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


def draw(plan: Plan, sampler: Sampler, settings: Mapping[str, Any], state: PartialState) -> None:
    """Draws all missing or damaged pictures; returns in every process when all processes have finished.

    `settings` are all that determines a picture of a given prompt and seed, for `images.json`.

    Raises:
        ValueError: if the folder holds pictures of other settings, if another evaluation draws into it, if a picture is
            not finite, or if some are missing at the end.
    """
    if not state.is_main_process:
        _draw_share(plan, sampler, state)
        return
    images = plan.folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    held = f"Another rdm-evaluate ({{holder}}) draws into {plan.folder}; wait for it, or choose another folder."
    with locked(plan.folder / LOCK, refusal=held):
        _check_record(plan, settings)
        for leftover in images.glob(f"{ASIDE}*"):  # of a killed process
            leftover.unlink()
        _remove_damaged(plan)
        _draw_share(plan, sampler, state)


def _check_record(plan: Plan, settings: Mapping[str, Any]) -> None:
    """Writes `images.json`, or checks that the existing pictures were drawn with the same settings."""
    record = {**settings, "prompts_sha256": digest_of_texts(plan.prompts), "first_seed": plan.first_seed}
    now, was = json.loads(json.dumps(record)), read_record(plan.folder)
    if (plan.folder / RECORD).exists():
        keys = [key for key in dict.fromkeys([*was, *now]) if key not in FREE and was.get(key) != now.get(key)]
        if keys:
            differences = "; ".join(f"{key} was {was.get(key)}, is {now.get(key)}" for key in keys)
            raise ValueError(
                f"{plan.folder} holds pictures of other settings ({differences}); choose another --output_dir, or "
                "remove it."
            )
        return
    if any(file.exists() for file in plan.files):
        raise ValueError(
            f"{plan.folder} holds pictures without their settings ({RECORD}); choose another --output_dir, or remove "
            "it."
        )
    write_whole(plan.folder / RECORD, json.dumps(sealed(now), indent=2) + "\n")


def _remove_damaged(plan: Plan) -> None:
    existing = [file for file in plan.files if file.exists()]
    damaged = {*unreadable(existing), *_changed(existing)}
    if damaged:
        warnings.warn(
            f"{len(damaged)} pictures in {plan.folder} are damaged, the first is {min(damaged).name}; they are drawn "
            "again.",
            stacklevel=2,
        )
    for file in damaged:
        file.unlink()


def _draw_share(plan: Plan, sampler: Sampler, state: PartialState) -> None:
    """Draws the batches of this process; no process starts before the first one has checked the folder."""
    state.wait_for_everyone()
    batches = plan.unfinished(sampler.batch_size, state.process_index, state.num_processes)
    with tqdm(total=sum(map(len, batches)), desc="drawn", unit="image", disable=not state.is_main_process) as bar:
        for batch in batches:
            _draw_batch(plan, sampler, batch, state.process_index)
            bar.update(len(batch))
    state.wait_for_everyone()
    missing = sum(not file.exists() for file in plan.files)
    if missing:
        raise ValueError(f"{missing} pictures are missing in {plan.folder}; give a folder that all processes share.")


def _draw_batch(plan: Plan, sampler: Sampler, batch: range, process: int) -> None:
    started = time.perf_counter()
    images, _ = sampler(prompts_for(plan.prompts, batch), [plan.first_seed + i for i in batch])
    seconds = time.perf_counter() - started
    if not images.isfinite().all():
        raise ValueError(f"Pictures {batch.start} to {batch.stop - 1} are not finite; try --dtype float32 or bfloat16.")
    aside = plan.folder / "images" / f"{ASIDE}{process}.png"
    for i, image in zip(batch, images, strict=True):
        if not plan.file(i).exists():
            save_image(image, plan.file(i), aside)
    log_batch(plan.folder, process, [plan.file(i) for i in batch], seconds)


def parent_of(folder: Path) -> Path:
    """The parent of a folder, also of a relative path such as `.`; links are not followed."""
    return Path(os.path.abspath(folder)).parent


def read_record(folder: Path) -> dict[str, Any]:
    """The `images.json` of the pictures in `folder/images`; empty if there is none; ValueError if it is damaged."""
    path = folder / RECORD
    try:
        return unsealed(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {folder} and start again.") from error


def log_batch(folder: Path, process: int, files: Sequence[Path], seconds: float) -> None:
    """Appends a drawn batch to the process's `speed-N.jsonl`."""
    digests = {file.name: digest_of_files([file]) for file in files}
    line = json.dumps(sealed({"images": len(files), "seconds": seconds, "files": digests}))
    path = folder / f"speed-{process}.jsonl"
    cut = path.exists() and not path.read_bytes().endswith(b"\n")  # a kill interrupted the last line
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + line + "\n")


def _read_logs(folder: Path) -> list[list[dict[str, Any] | None]]:
    """The logged batches of each process in their order; None, with a warning, for a damaged line."""
    processes = []
    for path in sorted(folder.glob("speed-*.jsonl")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            lines = [f"{path.name} cannot be read: {error.strerror}"]
        batches = [_read_batch(line) for line in lines if line.strip()]
        if None in batches:
            warnings.warn(
                f"{path} is damaged in line {batches.index(None) + 1}; the speed is computed without this line.",
                stacklevel=3,
            )
        processes.append(batches)
    return processes


def _read_batch(line: str) -> dict[str, Any] | None:
    try:
        batch = unsealed(line)
    except ValueError:
        return None
    if batch.keys() - {"files"} != {"images", "seconds"}:
        return None
    valid = (type(batch[name]) in (int, float) and 0 < batch[name] < math.inf for name in ("images", "seconds"))
    return batch if all(valid) else None


def images_per_second(folder: Path) -> float | None:
    """Pictures a second of one process, decoding included; None if no speed was logged.

    The first batch of a process is left out, unless it is the only one.
    """
    counted = [batch for batches in _read_logs(folder) for batch in (batches[1:] or batches) if batch is not None]
    seconds = sum(batch["seconds"] for batch in counted)
    return sum(batch["images"] for batch in counted) / seconds if seconds else None


def _changed(files: Sequence[Path]) -> list[Path]:
    """Those of a folder's pictures whose digest differs from the logged one; version 0.1.0 logged none."""
    logged: dict[str, set[str]] = {}
    for batches in _read_logs(parent_of(files[0].parent)) if files else ():
        for batch in batches:
            for name, digest in (batch or {}).get("files", {}).items():
                logged.setdefault(name, set()).add(digest)
    return [file for file in files if file.name in logged and digest_of_files([file]) not in logged[file.name]]


def given_pictures(folder: Path, prompts: Sequence[str], num_images: int | None = None) -> list[Path]:
    """The first pictures of a folder, all by default, in the order of their prompts; prints how they are paired.

    Raises:
        ValueError: if there are too few, if they were drawn for other prompts, if their names do not determine the
            prompts, or if one is damaged.
    """
    files = list_images(folder)
    if num_images and num_images > len(files):
        raise ValueError(f"{folder} holds {len(files)} pictures, not {num_images}; lower --num_images.")
    recorded = read_record(parent_of(folder)).get("prompts_sha256")
    if prompts and recorded not in (None, digest_of_texts(prompts)):
        raise ValueError(f"The pictures in {folder} were drawn for other prompts than those of --prompts; give theirs.")
    files = pair(files, prompts, num_images)
    broken = unreadable(files)
    if broken:
        raise ValueError(f"{len(broken)} of {len(files)} pictures are damaged: {min(broken.values())}")
    changed = _changed(files)
    if changed:
        raise ValueError(f"The picture {changed[0]} was changed since it was drawn; remove it and draw it again.")
    if prompts:
        print(describe_pairs(files, prompts))
    return files
