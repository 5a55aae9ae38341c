"""`rdm-card`: writes a student's card anew, for example when it has been measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.records import JSON_FILE, read_json
from ..hub import write_card
from ..pipelines import is_student

ERRORS = (ValueError, OSError)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="rdm-card", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="a student's folder")
    parser.add_argument("--name", help="what its readers load it by, for example me/student; the folder by default")
    parser.add_argument("--evaluation", type=Path, help="a folder of rdm-evaluate, whose numbers go into the card")
    parser.add_argument("--overwrite", action="store_true", help="replace a README.md that is there")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Writes `README.md`, and `evaluation.json` beside it if one is given.

    Raises:
        ValueError: if the folder holds no student, if there is a card already, or if the evaluation cannot be read.
    """
    args = make_parser().parse_args(argv)
    card = args.folder / "README.md"
    if not is_student(args.folder):
        raise ValueError(f"{args.folder} holds no student; give the output folder of a training or of rdm-export.")
    if card.exists() and not args.overwrite:
        raise ValueError(f"{card} is there already; replace it with --overwrite, or move it away.")
    if args.evaluation:
        evaluation = read_json(args.evaluation)
        (args.folder / JSON_FILE).write_text(json.dumps(evaluation, indent=2) + "\n")
    write_card(args.folder, args.name)
    print(f"Wrote {card}.")


def run() -> None:
    """The console script: `main`, its errors as one line."""
    try:
        main()
    except ERRORS as error:
        sys.exit(f"error: {error}")
