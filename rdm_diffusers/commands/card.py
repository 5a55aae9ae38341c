"""`rdm-card`: writes a student's card again, for example after an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bounds import FREE_TEXT, PATH, Bound, Parser
from ..config.record import without_folders
from ..evaluation.records import JSON_FILE, read_json
from ..families import CARD
from ..hub import finish_exports, student_files, write_card
from ..pipelines import is_student
from ..program import run_program
from ..untrusted import write_inside

BOUNDS: dict[str, Bound] = {"folder": PATH, "name": FREE_TEXT, "evaluation": PATH}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="rdm-card", description=__doc__)
    parser.add_argument("folder", help="a student's folder")
    parser.add_argument("--name", help="the name that readers load it by, such as me/student; the folder by default")
    parser.add_argument("--evaluation", help="a folder of rdm-evaluate, whose numbers the card will show")
    parser.add_argument("--overwrite", action="store_true", help="replace even a README.md that was edited")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Writes `README.md`, and `evaluation.json` beside it if one is given; a card that was edited stays.

    Raises:
        ValueError: if the folder holds no student, or if the evaluation or a file of the student cannot be read.
    """
    args = make_parser().parse_within(BOUNDS, argv)
    folder = Path(args.folder)
    finish_exports(folder)
    if not is_student(folder):
        raise ValueError(f"{folder} holds no student; give the output folder of a training or of rdm-export.")
    if args.evaluation:
        evaluation = for_others(read_json(Path(args.evaluation)))
        student_files(folder)  # first, because it refuses links out of the folder
        write_inside(folder, JSON_FILE, json.dumps(evaluation, indent=2) + "\n")
    card = write_card(folder, args.name, args.overwrite)
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
