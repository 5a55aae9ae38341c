"""A command line against its table of bounds: the types, the ranges in the help, and the check of every value."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from .bounds import Bound, Interval, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviations; of a flag that it does not know it says which ones are like it."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{**options, "allow_abbrev": False})

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's."""
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
            named = [flag + did_you_mean(flag, self._option_string_actions) for flag in flags]
            self.error(f"unrecognized arguments: {', '.join(named) or ' '.join(rest)}")
        return known

    def parse_within(self, bounds: Mapping[str, Bound], argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses, and ends the program with a sentence where a value is out of its bounds."""
        args = self.parse_args(argv)
        try:
            check_bounds(self, args, bounds)
        except ValueError as error:
            self.error(str(error))
        return args


def set_bounds(parser: argparse.ArgumentParser, bounds: Mapping[str, Bound]) -> None:
    """Gives each flag of numbers its type and the range in its help; call it when all flags are there."""
    for action in parser._actions:
        bound = bounds.get(action.dest)
        if isinstance(bound, Interval):
            action.type = bound.parse
            action.help = action.help if bound.says else f"{action.help}; {bound.range}"


def check_bounds(parser: argparse.ArgumentParser, args: argparse.Namespace, bounds: Mapping[str, Bound]) -> None:
    """Refuses the first value that its bound does not take; where a flag takes several, each is looked at.

    Raises:
        ValueError: one sentence that names the flag and says what would do.
    """
    for action in parser._actions:
        value, bound = getattr(args, action.dest, None), bounds.get(action.dest)
        if bound is None or value is None:
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            problem = bound.problem(one)
            if problem:
                raise ValueError(f"{flag_of(action)} {problem}.")


def flag_of(action: argparse.Action) -> str:
    """What users call an argument: its first name, or where it has a place, what the usage calls it."""
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
