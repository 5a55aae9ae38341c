"""Passwords and tokens on a command line, refused before anything reads, shows or records it."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence

import psutil

from ..untrusted import INSTEAD, has_secret

TOKEN_FLAG = "--hub_token"
ACCELERATE = r"accelerate launch$|accelerate-launch$|accelerate.commands.launch(\.py)?$"  # the ways to call it


def refuse_secrets(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Ends the program where a flag's value holds a password or a token, without showing it.

    `--hub_token` may hold one, except under `accelerate launch`, which prints its command line when a run fails. It
    would print it for this reason, too; so it is ended with the program where it holds one.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parent = psutil.Process().parent()
    launcher = None if words_of_launcher(parent) is None else parent
    sentence = problem(words, under_accelerate=launcher is not None)
    if sentence is None:
        return
    parser.print_usage(sys.stderr)
    print(f"{parser.prog}: error: {sentence}", file=sys.stderr, flush=True)
    if launcher is not None:
        os.kill(launcher.pid, signal.SIGTERM)
    sys.exit(2)


def problem(words: Sequence[str], under_accelerate: bool = False) -> str | None:
    """What is wrong with a command line, in one sentence that does not repeat the secret; None if nothing is."""
    flag = "a word without a flag"
    for word in words:
        name, _, value = word.partition("=") if word.startswith("--") else ("", "", word)
        flag = name or flag
        if flag == TOKEN_FLAG and value:
            if under_accelerate:
                return f"{TOKEN_FLAG} would be printed by accelerate launch when the run fails; {INSTEAD}."
            flag = "a word without a flag"
        elif has_secret(value) or has_secret(name):
            return f"{flag.split(':')[0]} holds what looks like a password or a token, which a run records; {INSTEAD}."
    return None


def words_of_launcher(parent: psutil.Process | None) -> Sequence[str] | None:
    """What follows `accelerate launch` on our parent's command line; None if the parent is another program."""
    try:
        return None if parent is None else launch_words(parent.cmdline())
    except psutil.Error:
        return None


def launch_words(words: Sequence[str]) -> Sequence[str] | None:
    """What follows `accelerate launch` on a command line; None if that is not there."""
    for i in range(len(words)):
        if re.search(ACCELERATE, " ".join(words[max(i - 1, 0) : i + 1])):
            return words[i + 1 :]
    return None
