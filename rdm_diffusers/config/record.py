"""What others may see of a run's arguments: in its configuration, its metrics and its card."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..untrusted import without_secrets
from .presets import TEACHER
from .run_config import all_settings

PATHS = {each.name for each in all_settings() if each.flag.is_path}
FLAGS = {f"--{name}" for each in all_settings() if each.flag.is_path for name in each.names}
# Left out with their values: a secret, and what nobody else has.
UNSHOWN = ("--config", "--hub_token", "--resume_from_checkpoint")


def command_line(script: str, words: Sequence[str]) -> str:
    """The command that repeats a run elsewhere: without the token, and without this machine's folders.

    Args:
        script: the training script's name.
        words: its arguments as they were given.
    """
    shown: list[str] = []
    rest, latest = iter(words), ""
    for word in rest:
        flag, equals, value = word.partition("=")
        latest = flag if word.startswith("--") else latest
        if flag in UNSHOWN:
            if not equals:
                next(rest, None)
        elif flag in FLAGS:
            value = without_folders(value if equals else next(rest, ""))
            shown += [f"{flag}={value}"] if equals else [flag, value]
        else:  # perhaps a flag's second value
            shown.append(without_folders(word) if latest in FLAGS else word)
    return without_secrets(shlex.join(["accelerate", "launch", script, *shown]))


def without_folders(value: Any) -> Any:
    """A path's last name where the rest shows this machine's folders: a full path, or one that goes up from here.

    Anything else is unchanged; in `name=path:weight`, a reward's, the path alone is looked at.
    """
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    if not isinstance(value, str):
        return value
    name, equals, path = value.rpartition("=")
    shows_folders = os.path.isabs(path) or path.startswith("..")
    return f"{name}{equals}{os.path.basename(os.path.normpath(path))}" if shows_folders else value


def _cleaned(value: Any) -> Any:
    """A value without passwords and tokens, which older releases recorded."""
    if isinstance(value, list):
        return [_cleaned(one) for one in value]
    return without_secrets(value) if isinstance(value, str) else value


def training_record(arguments: Mapping[str, Any], updates: int, averaged: bool | None = None) -> dict[str, Any]:
    """`StudentConfig.training`: the `command`, all `arguments`, and what was done.

    Args:
        arguments: the run's, as its checkpoints record them.
        updates: how many were done, whatever the arguments say.
        averaged: whether the weights are the moving average; as the run says if None.
    """
    averaged = arguments.get("use_ema") if averaged is None else averaged
    command = arguments.get("command")
    known = {"command": command and without_secrets(command), "arguments": shown_arguments(arguments)}
    return {**known, "updates": updates, "averaged": averaged}


def shown_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """A run's arguments without this machine's folders, without secrets, and without the command."""
    shown = {
        name: _cleaned(value) for name, value in given.items() if name != "command" and "token" not in name.split("_")
    }
    arguments = {name: without_folders(value) if name in PATHS else value for name, value in shown.items()}
    for name in (TEACHER, "single_file_config"):
        if arguments.get(name) != shown.get(name):  # it may be called as an embedded one or one on the Hub is
            arguments[name] += " (a local file)" if arguments[name].endswith(".safetensors") else " (a local folder)"
    return arguments
