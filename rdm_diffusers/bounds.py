"""Which values a flag allows (numbers in an interval, names from a list, text of a kind), and the check of them.

Every parser has a table of bounds, which gives its flags their types and the ranges in the help.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, NoReturn

MANY = 10**9  # the highest count
FEW = 3  # a list of so few names needs no hint at the nearest one
NOT_IN_GIT = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[/.-]|(/|\.|\.lock)$")  # in names of branches and tags


class Bound(ABC):
    """Which values one flag allows; `kinds` are their types in JSON."""

    kinds: ClassVar[tuple[type, ...]] = (str,)

    @abstractmethod
    def problem(self, value: Any) -> str | None:
        """The end of a sentence that starts with the flag: what is wrong, and what is allowed; None if it is fine."""

    def parse(self, text: str) -> Any:
        """A word of the command line as a value, inside or outside of the bounds."""
        return text


@dataclass(frozen=True)
class Interval(Bound):
    """Numbers.

    Args:
        text: the interval as in mathematics, for example `[0, 1)`; `inf` itself is never allowed.
        whole: whether they are whole numbers.
        also: further allowed numbers or words.
        says: replaces the interval in the error, after "it must".
    """

    text: str
    whole: bool = False
    also: tuple[float | str, ...] = ()
    says: str = ""

    @property
    def ends(self) -> tuple[float, float]:
        """The lower and the upper end, each of which may be outside of the interval."""
        number: Callable[[str], float] = int if self.whole else float
        low, high = self.text[1:-1].split(",")
        return number(low), number(high)

    @property
    def wants(self) -> str:
        """What a number must do, in words."""
        low, high = self.ends
        if self.says:
            return self.says
        if self.whole:
            interval = f"be at least {low} and at most {high}"
        elif high < math.inf:
            interval = f"lie in {self.text}"
        elif self.text[0] == "(":
            interval = f"be a finite number above {low:g}"
        else:
            interval = f"be a finite number of {low:g} or more"
        return "".join([interval, *(f", or be {other}" for other in self.also)])

    @property
    def range(self) -> str:
        """The allowed values in few words, for the help."""
        low, high = self.ends
        if high >= MANY:
            ends = f"above {low:g}" if self.text[0] == "(" else f"{low:g} or more"
        else:
            ends = f"{low} to {high}" if self.whole else self.text
        return ", or ".join([ends, *map(str, self.also)])

    def __contains__(self, value: Any) -> bool:
        if value in self.also:
            return True
        if isinstance(value, str):
            return False
        low, high = self.ends
        above = value > low or (value == low and self.text[0] == "[")
        return above and (value < high or (value == high and self.text[-1] == "]"))

    def problem(self, value: Any) -> str | None:
        return None if value in self else f"is {value}; it must {self.wants}"

    def parse(self, text: str) -> float | str:
        """A word of the command line as a number, inside or outside of the interval; an argument's `type`.

        Raises:
            ArgumentTypeError: if it is no number.
        """
        if text in self.also:
            return text
        try:
            return int(text) if self.whole else float(text)
        except ValueError as error:
            kind = "whole number" if self.whole else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind}; it must {self.wants}") from error


@dataclass(frozen=True)
class OneOf(Bound):
    """Names from a list.

    Args:
        names: the list, or a function that makes it, where it depends on what is installed.
    """

    names: tuple[str, ...] | Callable[[], tuple[str, ...]]

    def problem(self, value: Any) -> str | None:
        names = self.names() if callable(self.names) else self.names
        if value in names:
            return None
        hint = did_you_mean(value, names) if len(names) > FEW else ""
        return f"is {_shown(value)}{hint}; it must be {_alternatives(names)}"


@dataclass(frozen=True)
class Text(Bound):
    """Text that is not blank.

    Args:
        wants: what it is, after "it must be".
        allows: whether a text is allowed.
        secret: whether errors must not show it.
    """

    wants: str
    allows: Callable[[str], bool] = bool
    secret: bool = False

    def problem(self, value: Any) -> str | None:
        text = str(value)
        if text.strip() and self.allows(text):
            return None
        return f"is {'not shown here' if self.secret and text.strip() else _shown(text)}; it must be {self.wants}"


def _shown(value: Any) -> str:
    return str(value) if str(value).strip() else "empty"


def _alternatives(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean a or b?)`, or nothing if no known name is similar."""
    close = get_close_matches(name, list(known))
    return f" (did you mean {_alternatives(close)}?)" if close else ""


def whole(text: str, also: tuple[float | str, ...] = ()) -> Interval:
    """Whole numbers of an interval."""
    return Interval(text, whole=True, also=also)


def real(text: str, also: tuple[float | str, ...] = (), says: str = "") -> Interval:
    """Numbers of an interval."""
    return Interval(text, also=also, says=says)


def is_git_name(text: str) -> bool:
    """Whether a branch, a tag or a commit could have this name."""
    return not NOT_IN_GIT.search(text)


def stays_inside(path: str) -> bool:
    """Whether a path relative to a folder stays in it."""
    return not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] != os.pardir


def _fits_in_a_header(text: str) -> bool:
    """Whether a request's header could hold a text: printable ASCII without blanks."""
    return text.isascii() and text.isprintable() and " " not in text


# Bounds that several parsers share.
COUNT = whole(f"[1, {MANY}]")
FREE_TEXT = Text("a text")
GUIDANCE = real("[0, 1000]")
FOLDER_OR_ID = Text("a folder or a Hub id")
MODEL = Text("a folder, a Hub id, or an embedded teacher's name")
PATH = Text("a path")
PLACE_INSIDE = Text("a relative path that stays inside the output folder", stays_inside)
REVISION = Text("a branch, a tag or a commit, in which are no blanks and no '..'", is_git_name)
SEED = whole(f"[0, {2**64 - 1}]")  # of torch's generators
STEPS = whole("[1, 1000]")  # most teachers have no more times
TOKEN = Text("one word, as `hf auth login` takes it", _fits_in_a_header, secret=True)
TOKENS = whole("[1, 4096]")
VARIANT = Text("one word, for example fp16", lambda text: re.fullmatch(r"[\w.-]+", text) is not None)


class Parser(argparse.ArgumentParser):
    """argparse's without abbreviations; an unknown flag is answered with similar ones, and an error is one line."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Ends the program with the sentence alone; argparse shows all flags before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's."""
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
            named = [flag + did_you_mean(flag, self._option_string_actions) for flag in flags]
            self.error(f"unrecognized arguments: {', '.join(named) or ' '.join(rest)}")
        return known

    def parse_within(self, bounds: Mapping[str, Bound], argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses, and ends the program with one sentence at the first value that is out of its bounds."""
        args = self.parse_args(argv)
        for action in self._actions:
            value, bound = getattr(args, action.dest, None), bounds.get(action.dest)
            if bound is not None and value is not None:
                values = value if isinstance(value, list | tuple) else [value]
                for problem in filter(None, map(bound.problem, values)):
                    self.error(f"{flag_of(action)} {problem}.")
        return args


def set_bounds(parser: argparse.ArgumentParser, bounds: Mapping[str, Bound]) -> None:
    """Gives each flag with an interval its type and the range in its help; call it when all flags are added."""
    for action in parser._actions:
        bound = bounds.get(action.dest)
        if isinstance(bound, Interval):
            action.type = bound.parse
            action.help = action.help if bound.says else f"{action.help}; {bound.range}"


def flag_of(action: argparse.Action) -> str:
    """What users call an argument: its first flag, or a positional argument's name in the usage."""
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
