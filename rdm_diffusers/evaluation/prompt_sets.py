"""The prompts that are drawn: well-known sets, a file, or the tiny teachers' captions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from ..prompts import DATA_FILES, read_captions, read_prompts
from ..tiny import is_tiny
from ..tiny.captions import CAPTIONS

HPDV2_DATASET, HPDV2_STYLES = "zhwang/HPDv2", ("anime", "concept-art", "paintings", "photo")
COCO_DATASET, COCO_COLUMN = "sayakpaul/coco-30-val-2014", "caption"
PARTI_DATASET, PARTI_COLUMN = "nateraw/parti-prompts", "Prompt"
SPLIT = "train"  # the only one that these two have


def load_prompt_set(name: str) -> list[str]:
    """The prompts of a set, in a fixed order.

    Args:
        name: one of `PROMPT_SETS`, a tiny teacher's name for its captions, or a file with one prompt a line. A set may
            have a place of its own, `name=folder`: a local copy of the Hub dataset.

    Raises:
        ValueError: one sentence, if there is no such set or file, or if it is empty or out of reach.
    """
    known, _, place = name.partition("=")
    if is_tiny(name):
        return list(CAPTIONS)
    if known not in PROMPT_SETS:
        return _read_lines(Path(name))
    try:
        prompts = PROMPT_SETS[known](place or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The prompts {known} could not be had ({str(error).splitlines()[0]}); connect to the network, or give "
            f"--prompts {known}=FOLDER with a copy of the dataset, or a file with one prompt a line."
        ) from error
    return prompts


def prompts_for(prompts: Sequence[str], indices: Sequence[int]) -> list[str]:
    """The prompts of the pictures with these numbers: all in turn, and again from the first."""
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


def _hpdv2(folder: str | None) -> list[str]:
    """The benchmark prompts of HPSv2 (arXiv 2306.09341), the four styles in turn, so that any first N are balanced."""
    styles = [_read_list(_hpdv2_file(style, folder)) for style in HPDV2_STYLES]
    if len({len(style) for style in styles}) != 1:
        raise ValueError(f"its four styles have {', '.join(str(len(style)) for style in styles)} prompts, not as many")
    return list(chain.from_iterable(zip(*styles, strict=True)))


def _read_list(path: Path) -> list[str]:
    """A JSON list of prompts."""
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    texts = isinstance(prompts, list) and all(isinstance(text, str) and text.strip() for text in prompts)
    if not texts or not prompts:
        raise ValueError(f"{path} is no list of prompts")
    return prompts


def _hpdv2_file(style: str, folder: str | None) -> Path:
    """From the folder, from where the package hpsv2 keeps them, or from the Hub."""
    from huggingface_hub import hf_hub_download

    name = f"benchmark/{style}.json"
    kept = Path(os.environ.get("HPS_ROOT", "~/.cache/hpsv2")).expanduser() / "datasets" / name
    if folder is None:
        return kept if kept.is_file() else Path(hf_hub_download(HPDV2_DATASET, name, repo_type="dataset"))
    found = [path for path in (Path(folder) / name, Path(folder) / f"{style}.json") if path.is_file()]
    if not found:
        raise ValueError(f"{Path(folder) / name} does not exist")
    return found[0]


def _column(dataset: str, column: str) -> Callable[[str | None], list[str]]:
    """A reader of one column of a Hub dataset, or of a local copy of it; of a row's several captions, of the first."""

    def read(folder: str | None) -> list[str]:
        rows = read_captions(folder or dataset, column, SPLIT, flags=("the dataset", "the column"))
        return [captions[0] for captions in rows]

    return read


PROMPT_SETS: dict[str, Callable[[str | None], list[str]]] = {
    "hpdv2": _hpdv2,
    "coco": _column(COCO_DATASET, COCO_COLUMN),
    "parti": _column(PARTI_DATASET, PARTI_COLUMN),
}
