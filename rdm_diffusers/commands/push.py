"""`rdm-push`: uploads a student's folder to the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..bounds import FREE_TEXT, PATH, REVISION, TOKEN, Bound, Parser, Text, is_git_name
from ..families import use_token
from ..hub import finish_exports
from ..program import run_program
from ..training.publish import push_run

BOUNDS: dict[str, Bound] = {
    "folder": PATH,
    "repo_id": Text("NAME or USER/NAME"),
    "token": TOKEN,
    "revision": REVISION,
    "commit_message": FREE_TEXT,
    "tag": Text("a name without blanks and without '..'", is_git_name),
    "space": Text("NAME or USER/NAME"),
}

SAME_NAME = "the student's name"  # which no repository can have


def make_parser() -> Parser:
    """The command line."""
    parser = Parser("rdm-push", description=__doc__)
    add = parser.add_argument
    add("folder", help="the student's folder, the --output_dir of its training")
    add("repo_id", help="USER/NAME, or a name in your own account")
    add("--hub_token", "--token", dest="token", help="with write access; default: that of `hf auth login` or HF_TOKEN")
    add("--private", "--hub_private_repo", action="store_true", default=None,
        help="make a new repository visible only to you")  # fmt: skip
    add("--revision", help="the branch to push to, made if it is missing; main by default")
    add("--commit_message", help="the first line of the commit")
    add("--tag", help="a name for the commit, for example v1")
    add("--tag_checkpoints", action="store_true",
        help="first push the student of each checkpoint in the folder, with a tag of its name")  # fmt: skip
    add("--space", nargs="?", const=SAME_NAME, metavar="NAME",
        help="then make or update a Space with rdm-demo of the student; NAME is the student's by default")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> str:
    """Pushes a student and prints where it is; the commit's address.

    Raises:
        ValueError, OSError: one sentence on what is wrong and what to do.
    """
    args = vars(make_parser().parse_within(BOUNDS, argv))
    use_token(args.pop("token"))
    folder = Path(args.pop("folder"))
    finish_exports(folder)
    if args["space"] == SAME_NAME:
        args["space"] = args["repo_id"]
    address = push_run(folder, **args)
    print(f"The student is at {address}")
    if args["space"] and args["private"]:
        print("To read the private student, its Space needs a token as the secret HF_TOKEN in its settings.")
    return address


def run() -> None:
    """The console script: `main`, with its errors as one line."""
    run_program(main)
