"""`rdm-push`: a student, from its folder to the Hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..families import use_token
from ..hub import finish_exports
from ..program import run_program
from ..training.publish import push_run


def make_parser() -> argparse.ArgumentParser:
    """The parser of `rdm-push`."""
    parser = argparse.ArgumentParser("rdm-push", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("folder", type=Path, help="the student's folder, the --output_dir of its training")
    add("repo_id", help="USER/NAME, or a name of your own")
    add("--hub_token", "--token", dest="token", help="with write access; that of `hf auth login` or HF_TOKEN else")
    add("--private", "--hub_private_repo", action="store_true", default=None,
        help="make a new repository one that only you can see")  # fmt: skip
    add("--revision", help="the branch to push to, made if it is missing; main by default")
    add("--commit_message", help="the first line of the commit")
    add("--tag", help="a name for the commit, for example v1")
    add("--tag_checkpoints", action="store_true",
        help="before it, push the student of each checkpoint in the folder, under a tag of its name")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> str:
    """Pushes a student and says where it is.

    Args:
        argv: the command line; that of the program by default.

    Returns:
        The commit's address.

    Raises:
        ValueError, OSError: one sentence on what is wrong and what to do.
    """
    args = vars(make_parser().parse_args(argv))
    use_token(args.pop("token"))
    finish_exports(args["folder"])
    address = push_run(**args)
    print(f"The student is at {address}")
    return address


def run() -> None:
    """The console script: `main`, with its errors as one line."""
    run_program(main)
