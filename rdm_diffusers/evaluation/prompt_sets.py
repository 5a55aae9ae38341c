"""The prompts of an evaluation: well-known sets, a file, or the tiny teachers' captions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from ..prompts import DATA_FILES, read_captions, read_prompts
from ..tiny import is_tiny
from ..tiny.domains import domain_of

HPDV2_DATASET, HPDV2_STYLES = "zhwang/HPDv2", ("anime", "concept-art", "paintings", "photo")
COCO_DATASET, COCO_COLUMN = "sayakpaul/coco-30-val-2014", "caption"
PARTI_DATASET, PARTI_COLUMN = "nateraw/parti-prompts", "Prompt"
SPLIT = "train"  # the only one of both datasets


def load_prompt_set(name: str) -> list[str]:
    """The prompts of a set, in a fixed order.

    Args:
        name: one of `PROMPT_SETS`, or `set=folder` with a local copy of the Hub dataset; a tiny teacher's name for its
            captions; or a file with one prompt a line.

    Raises:
        ValueError: one sentence, if the set or file does not exist, is empty, or cannot be downloaded.
    """
    known, _, folder = name.partition("=")
    if is_tiny(name):
        return list(domain_of(name).captions)
    if known not in PROMPT_SETS:
        return _read_lines(Path(name))
    try:
        return PROMPT_SETS[known](folder or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The prompts {known} could not be loaded ({str(error).splitlines()[0]}); connect to the network, or give "
            f"--prompts {known}=FOLDER with a copy of the dataset, or a file with one prompt a line."
        ) from error


def prompts_for(prompts: Sequence[str], indices: Sequence[int]) -> list[str]:
    """The prompts of the pictures with these indices; after the last prompt the first one follows."""
    return [prompts[i % len(prompts)] for i in indices]


def _read_lines(path: Path) -> list[str]:
    if not path.exists():
        raise ValueError(
            f"--prompts {path} is neither a file nor one of {', '.join(PROMPT_SETS)}; give a text file with one prompt "
            "a line."
        )
    if path.suffix.lower() in DATA_FILES:
        raise ValueError(f"--prompts {path} is a table; write its captions into a text file, one a line.")
    return read_prompts(path, "--prompts")


def _read_hpdv2(folder: str | None) -> list[str]:
    """The benchmark prompts of HPSv2 (arXiv 2306.09341), the four styles in turn, so that any first N are balanced."""
    styles = [_read_list(_hpdv2_file(style, folder)) for style in HPDV2_STYLES]
    counts = [len(style) for style in styles]
    if len(set(counts)) != 1:
        raise ValueError(f"its four styles have different numbers of prompts: {', '.join(map(str, counts))}")
    return list(chain.from_iterable(zip(*styles, strict=True)))


def _hpdv2_file(style: str, folder: str | None) -> Path:
    """From the folder, else from the cache of the package hpsv2, or from the Hub."""
    from huggingface_hub import hf_hub_download

    name = f"benchmark/{style}.json"
    if folder is None:
        cached = Path(os.environ.get("HPS_ROOT", "~/.cache/hpsv2")).expanduser() / "datasets" / name
        return cached if cached.is_file() else Path(hf_hub_download(HPDV2_DATASET, name, repo_type="dataset"))
    for path in (Path(folder) / name, Path(folder) / f"{style}.json"):
        if path.is_file():
            return path
    raise ValueError(f"{Path(folder) / name} does not exist")


def _read_list(path: Path) -> list[str]:
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError(f"{path} is not a list of prompts")
    return prompts


def _read_column(dataset: str, column: str, folder: str | None) -> list[str]:
    """One column of a Hub dataset, or of a local copy; the first of a row's several captions."""
    rows = read_captions(folder or dataset, column, SPLIT, flags=("the dataset", "the column"))
    return [captions[0] for captions in rows]


PROMPT_SETS: dict[str, Callable[[str | None], list[str]]] = {
    "hpdv2": _read_hpdv2,
    "coco": partial(_read_column, COCO_DATASET, COCO_COLUMN),
    "parti": partial(_read_column, PARTI_DATASET, PARTI_COLUMN),
}
