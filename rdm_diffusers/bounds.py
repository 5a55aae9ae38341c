"""What a flag takes: numbers in an interval, names out of a list, or text of a kind.

Every parser has a table of them, and `parsing.py` the one check of all tables.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

MANY = 10**9  # of anything that is counted
FEW = 3  # names, of which the nearest need not be pointed out
HIDDEN = "not shown here"
NOT_IN_GIT = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[/.-]|(/|\.|\.lock)$")  # of a branch's or tag's name


class Bound(ABC):
    """What one flag takes."""

    @abstractmethod
    def problem(self, value: Any) -> str | None:
        """What a sentence says after the flag: what is wrong with the value, and what would do; None if it is fine."""


@dataclass(frozen=True)
class Interval(Bound):
    """Numbers.

    Args:
        text: the interval as mathematics writes it, for example `[0, 1)`; `inf` itself is never taken.
        whole: whether they are whole numbers.
        also: what else is taken, numbers or words.
        says: what the sentence says instead of the interval, behind "it must".
    """

    text: str
    whole: bool = False
    also: tuple[float | str, ...] = ()
    says: str = ""

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest, themselves in the interval or not."""
        number: Callable[[str], float] = int if self.whole else float
        low, high = self.text[1:-1].split(",")
        return number(low), number(high)

    @property
    def wants(self) -> str:
        """What a number must do, in words."""
        return self.says or "".join([self._interval, *(f", or be {other}" for other in self.also)])

    @property
    def _interval(self) -> str:
        low, high = self.ends
        if self.whole:
            return f"be at least {low} and at most {high}"
        if high < math.inf:
            return f"lie in {self.text}"
        return f"be a finite number above {low:g}" if self.text[0] == "(" else f"be a finite number of {low:g} or more"

    @property
    def range(self) -> str:
        """For the help: what is taken, in few words."""
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
        """A word of the command line as a number, in the interval or not; the type of an argument.

        Raises:
            ArgumentTypeError: if it is none.
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
    """Names out of a list.

    Args:
        names: the list, or a function that finds it where it depends on what is installed.
        reason: what the sentence ends with.
    """

    names: tuple[str, ...] | Callable[[], tuple[str, ...]]
    reason: str = ""

    def problem(self, value: Any) -> str | None:
        names = self.names() if callable(self.names) else self.names
        if value in names:
            return None
        hint = did_you_mean(value, names) if len(names) > FEW else ""
        return f"is {shown(value)}{hint}; it must be {alternatives(names)}{self.reason}"


@dataclass(frozen=True)
class Text(Bound):
    """Text that is not blank.

    Args:
        wants: what it is, behind "it must be".
        allows: whether a text is one.
        secret: whether it must not be shown.
    """

    wants: str
    allows: Callable[[str], bool] = bool
    secret: bool = False

    def problem(self, value: Any) -> str | None:
        text = str(value)
        if text.strip() and self.allows(text):
            return None
        return f"is {HIDDEN if self.secret and text.strip() else shown(text)}; it must be {self.wants}"


def shown(value: Any) -> str:
    """A value in a sentence."""
    return str(value) if str(value).strip() else "empty"


def alternatives(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean a or b?)`, if anything of what is known is like it."""
    close = get_close_matches(name, list(known))
    return f" (did you mean {alternatives(close)}?)" if close else ""


def whole(text: str, also: tuple[float | str, ...] = ()) -> Interval:
    """Whole numbers of an interval."""
    return Interval(text, whole=True, also=also)


def real(text: str, also: tuple[float | str, ...] = (), says: str = "") -> Interval:
    """Numbers of an interval."""
    return Interval(text, also=also, says=says)


def is_git_name(text: str) -> bool:
    """Whether a branch, a tag or a commit could have this name."""
    return not NOT_IN_GIT.search(text)


def is_one_word(text: str) -> bool:
    """Whether a text can stand in a header of a request: printable ASCII without blanks."""
    return text.isascii() and text.isprintable() and " " not in text


def stays_inside(path: str) -> bool:
    """Whether a path under a folder does not lead out of it."""
    return not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] != os.pardir


# What several parsers take.
COUNT = whole(f"[1, {MANY}]")
FREE_TEXT = Text("a text")
GUIDANCE = real("[0, 1000]")
MODEL = Text("a folder, a Hub id, or an embedded teacher's name")
PATH = Text("a path")
PLACE_INSIDE = Text("a relative path that stays inside the output folder", stays_inside)
REVISION = Text("a branch, a tag or a commit, in which are no blanks and no '..'", is_git_name)
SEED = whole(f"[0, {2**64 - 1}]")  # torch's generators take no others
SIDE = whole("[1, 16384]")  # pixels
STEPS = whole("[1, 1000]")  # most teachers know no more times
TOKEN = Text("one word, as `hf auth login` takes it", is_one_word, secret=True)
TOKENS = whole("[1, 4096]")
VARIANT = Text("one word, for example fp16", lambda text: re.fullmatch(r"[\w.-]+", text) is not None)
