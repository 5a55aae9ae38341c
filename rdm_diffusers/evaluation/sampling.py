"""Draws pictures into a folder: in any number of processes, and after an interruption only those that are missing.

A picture depends on its prompt and its seed only, and its seed is the first seed plus its number. A network's rounding
also depends on what else is in the batch; so batches are always cut at the same places, a process takes whole batches
in turn, and one that was interrupted is drawn again as a whole, though nothing that is there is written again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from .digests import digest_of_texts
from .image_files import save_image
from .prompt_sets import prompts_for
from .subjects import Subject

RECORD = "images.json"
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


def draw(plan: Plan, subject: Subject, state: PartialState) -> None:
    """Draws what is missing; returns in every process when all have finished.

    Raises:
        ValueError: if the folder holds pictures of other settings, if a picture is not finite, or if not all arrived.
    """
    if state.is_main_process:
        (plan.folder / "images").mkdir(parents=True, exist_ok=True)
        check_record(plan, subject.record)
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
    aside = plan.folder / "images" / f".process-{process}.png"
    for i, image in zip(batch, images, strict=True):
        if not plan.file(i).exists():
            save_image(image, plan.file(i), aside)
    with (plan.folder / f"speed-{process}.jsonl").open("a") as file:
        file.write(json.dumps({"images": len(batch), "seconds": seconds}) + "\n")


def check_record(plan: Plan, subject: Mapping[str, Any]) -> None:
    """Writes `images.json`, or makes sure that the pictures that are there were drawn with the same settings.

    Raises:
        ValueError: naming the settings that differ.
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
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(record, indent=2) + "\n")
    aside.replace(path)


def read_record(folder: Path) -> dict[str, Any]:
    """What `images.json` says of the pictures in `folder/images`; nothing where there is none.

    Raises:
        ValueError: if it is damaged.
    """
    path = folder / RECORD
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove {folder} and start again.") from error


def differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The entries that differ, in words."""
    keys = [key for key in dict.fromkeys([*was, *now]) if key not in FREE and was.get(key) != now.get(key)]
    return [f"{key} was {was.get(key)}, is {now.get(key)}" for key in keys]


def images_per_second(folder: Path) -> float | None:
    """Pictures a second of one process, decoding included; of each process's first batch of many, nothing is counted.

    Returns:
        None where no speed was noted.
    """
    counted: list[dict[str, float]] = []
    for path in sorted(folder.glob("speed-*.jsonl")):
        batches = [json.loads(line) for line in path.read_text().splitlines()]
        counted += batches[1:] if len(batches) > 1 else batches
    seconds = sum(batch["seconds"] for batch in counted)
    return sum(batch["images"] for batch in counted) / seconds if seconds else None
