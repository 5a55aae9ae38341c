"""Existing pictures: checked, and paired with their prompts by the numbers in their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .digests import digest_of_texts
from .pictures import list_images, unreadable
from .sampling import changed_pictures, parent_of, read_record

NUMBER = re.compile(r"(\d+)")


def given_pictures(folder: Path, prompts: Sequence[str], num_images: int | None = None) -> list[Path]:
    """The pictures of a folder in the order of their prompts; prints how they are paired.

    Args:
        folder: holds the pictures.
        prompts: what they were drawn for; empty if unknown.
        num_images: how many are taken, from the first; all by default.

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
    changed = changed_pictures(files)
    if changed:
        raise ValueError(f"The picture {changed[0]} was changed since it was drawn; remove it and draw it again.")
    if prompts:
        print(describe_pairs(files, prompts))
    return files


def pair(files: Sequence[Path], prompts: Sequence[str], num_images: int | None = None) -> list[Path]:
    """The first pictures in the order of their prompts: picture i belongs to prompt i modulo the number of prompts.

    Raises:
        ValueError: if the names are not numbered without gaps from 0 or 1, and there are not as many pictures as
            prompts.
    """
    ordered = sorted(files, key=natural_key)
    taken = ordered[:num_images]
    if not prompts or len(ordered) == len(prompts):
        return taken
    numbers = numbers_of(taken)
    first = numbers[0] if numbers else None
    if first not in (0, 1) or numbers != list(range(first, first + len(taken))):
        raise ValueError(
            f"The pictures in {ordered[0].parent} cannot be paired with the prompts: there are {len(ordered)} pictures "
            f"and {len(prompts)} prompts, and {_numbering_problem(taken, numbers)}. Number the pictures like their "
            "prompts, from 0 or from 1 without gaps, or give as many prompts as pictures, in the order of their names."
        )
    return taken


def describe_pairs(files: Sequence[Path], prompts: Sequence[str]) -> str:
    """One line with the first and the last pair of picture and prompt."""
    indices = [0] if len(files) == 1 else [0, len(files) - 1]
    pairs = [f"{files[i].name} with {prompts[i % len(prompts)][:60]!r}" for i in indices]
    return f"Pictures and prompts are paired in their order: {', ..., '.join(pairs)}."


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """A key that sorts `2.png` before `10.png`."""
    parts = [part for part in NUMBER.split(path.stem) if part]
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts] + [(2, 0, path.suffix)]


def numbers_of(files: Sequence[Path]) -> list[int]:
    """The numbers in names that differ in one number only; empty if they differ in more, or have no number."""
    parts = [NUMBER.split(file.stem) for file in files]
    if len({len(part) for part in parts}) != 1 or len(parts[0]) < 3:
        return []
    columns = list(zip(*parts, strict=True))  # texts at even places, numbers at odd ones
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1] or [len(columns) - 2]
    return [int(text) for text in columns[varying[0]]] if len(varying) == 1 and varying[0] % 2 else []


def _numbering_problem(files: Sequence[Path], numbers: Sequence[int]) -> str:
    if not numbers:
        return "their names do not differ in one number alone"
    for file, before, number in zip(files[1:], numbers, numbers[1:], strict=False):
        if number != before + 1:
            return f"number {before} is followed by {file.name}"
    return f"the first is {files[0].name}"
