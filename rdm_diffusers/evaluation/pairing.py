"""Which prompt a picture that is there already belongs to, by the pictures' names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

NUMBER = re.compile(r"(\d+)")


def natural(path: Path) -> list[tuple[int, int, str]]:
    """A key that sorts `2.png` before `10.png`."""
    parts = [part for part in NUMBER.split(path.stem) if part]
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts] + [(2, 0, path.suffix)]


def pair(files: Sequence[Path], prompts: Sequence[str], used: int | None = None) -> list[Path]:
    """The pictures in the order of their prompts: the i-th belongs to prompt i modulo the number of prompts.

    Args:
        files: all that are in the folder, in any order.
        prompts: what they were drawn for; none if that is unknown.
        used: how many are taken, from the first; all by default.

    Raises:
        ValueError: if the names leave it open which prompt a picture belongs to: they are not numbered without gaps
            from 0 or 1, nor are there as many pictures as prompts.
    """
    ordered = sorted(files, key=natural)
    taken = ordered[:used]
    if not prompts or len(ordered) == len(prompts):
        return taken
    numbers = numbers_of(taken)
    first = numbers[0] if numbers else None
    if first not in (0, 1) or numbers != list(range(first, first + len(taken))):
        raise ValueError(
            f"The pictures in {ordered[0].parent} cannot be paired with the prompts: there are {len(ordered)} and "
            f"{len(prompts)}, and {_gap(taken, numbers)}. Number the pictures as their prompts, from 0 or from 1 "
            "without gaps, or give as many prompts as pictures, in the order of their names."
        )
    return taken


def as_paired(files: Sequence[Path], prompts: Sequence[str]) -> str:
    """One line that says how pictures and prompts are paired, by the first and the last of them."""
    shown = [0] if len(files) == 1 else [0, len(files) - 1]
    pairs = [f"{files[i].name} with {prompts[i % len(prompts)][:60]!r}" for i in shown]
    return f"Pictures and prompts are paired in their order: {', ..., '.join(pairs)}."


def numbers_of(files: Sequence[Path]) -> list[int]:
    """The numbers in names that are alike but for one number; none where they differ in more, or have none."""
    parts = [NUMBER.split(file.stem) for file in files]
    if len({len(part) for part in parts}) != 1 or len(parts[0]) < 3:
        return []
    columns = [[part[i] for part in parts] for i in range(len(parts[0]))]
    counting = [i for i in range(1, len(columns), 2) if len(set(columns[i])) > 1] or [len(columns) - 2]
    others = (column for i, column in enumerate(columns) if i not in counting)
    if len(counting) > 1 or any(len(set(column)) > 1 for column in others):
        return []
    return [int(text) for text in columns[counting[0]]]


def _gap(files: Sequence[Path], numbers: Sequence[int]) -> str:
    """What is wrong with the numbers, in words."""
    if not numbers:
        return "their names do not differ in one number alone"
    for file, before, number in zip(files[1:], numbers, numbers[1:], strict=False):
        if number != before + 1:
            return f"after number {before} comes {file.name}"
    return f"the first is {files[0].name}"
