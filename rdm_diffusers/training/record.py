"""What others may see of a run's arguments: in its configuration, its metrics and its card."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

UNSHOWN = ("--hub_token", "--resume_from_checkpoint")  # with their values: a secret, and what nobody else has


def command_line(script: str, words: Sequence[str]) -> str:
    """The command that repeats a run elsewhere: without the token, and without this machine's folders.

    Args:
        script: the training script's name.
        words: its arguments as they were given.
    """
    shown: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in UNSHOWN:
            if not equals:
                next(rest, None)
            continue
        shown.append(f"{flag}={without_folders(value)}" if equals else without_folders(word))
    return shlex.join(["accelerate", "launch", script, *shown])


def without_folders(value: Any) -> Any:
    """An absolute or existing path's last name, which tells nothing of the machine; anything else unchanged."""
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    is_path = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))
    return Path(value).resolve().name if is_path else value


def training_record(args: argparse.Namespace, updates: int | None = None) -> dict[str, Any]:
    """`StudentConfig.training`: the command, all arguments, and the number of updates, by default all of the run's."""
    arguments = {name: without_folders(value) for name, value in vars(args).items() if name != "command"}
    done = args.max_train_steps if updates is None else updates
    return {"command": vars(args).get("command"), "arguments": arguments, "updates": done}
