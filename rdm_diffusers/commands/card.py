"""`rdm-card`: writes a student's card anew, for example when it has been measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.records import JSON_FILE, read_json
from ..families import CARD
from ..hub import finish_exports, write_card
from ..pipelines import is_student
from ..program import run_program
from ..training.record import without_folders


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="rdm-card", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="a student's folder")
    parser.add_argument("--name", help="what its readers load it by, for example me/student; the folder by default")
    parser.add_argument("--evaluation", type=Path, help="a folder of rdm-evaluate, whose numbers go into the card")
    parser.add_argument("--overwrite", action="store_true", help="replace a README.md that was edited, too")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Writes `README.md`, and `evaluation.json` beside it if one is given; a card that was edited stays.

    Raises:
        ValueError: if the folder holds no student, or the evaluation or another file of it cannot be read.
    """
    args = make_parser().parse_args(argv)
    finish_exports(args.folder)
    if not is_student(args.folder):
        raise ValueError(f"{args.folder} holds no student; give the output folder of a training or of rdm-export.")
    if args.evaluation:
        evaluation = for_others(read_json(args.evaluation))
        (args.folder / JSON_FILE).write_text(json.dumps(evaluation, indent=2) + "\n")
    card = write_card(args.folder, args.name, args.overwrite)
    edited = card.name != CARD
    print(f"Wrote {card}{f', as {CARD} was edited; replace that with --overwrite' if edited else ''}.")


def for_others(evaluation: Any) -> Any:
    """An evaluation's record without the folders of this machine."""
    if isinstance(evaluation, dict):
        return {name: for_others(value) for name, value in evaluation.items()}
    if isinstance(evaluation, list):
        return [for_others(value) for value in evaluation]
    return without_folders(evaluation)


def run() -> None:
    """The console script: `main`, with its errors as one line."""
    run_program(main)
