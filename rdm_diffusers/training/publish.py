"""`--push_to_hub`: what is made sure of before a run, and the push after it."""

from __future__ import annotations

import argparse
from pathlib import Path

from accelerate import Accelerator

from ..hub import check_base, check_push, push_student


def check_hub(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Makes sure that the student can be pushed when it is done, and makes its repository; a dry run makes none.

    Raises:
        ValueError: if others could not load the student, or the repository cannot have its name.
        OSError: if the Hub would not take it.
    """
    if not args.push_to_hub or args.dry_run or not accelerator.is_main_process:
        return
    if args.student == "lora":
        check_base(args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path)
    check_push(repository(args), private=args.hub_private_repo, revision=args.hub_revision)


def publish(output_dir: Path, args: argparse.Namespace) -> None:
    """Pushes the finished student, if the arguments say so, and prints where it is.

    Raises:
        OSError: if the Hub did not take it, with the command that tries again.
    """
    if args.push_to_hub:
        address = push_student(
            output_dir,
            repository(args),
            private=args.hub_private_repo,
            revision=args.hub_revision,
            commit_message=args.hub_commit_message,
        )
        print(f"The student is at {address}")


def repository(args: argparse.Namespace) -> str:
    """The name to push to, by default that of the output folder."""
    return args.hub_model_id or Path(args.output_dir).resolve().name
