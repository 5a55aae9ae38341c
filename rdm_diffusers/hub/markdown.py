"""Foreign text in a card: prompts, names and licences become markdown, code or metadata only here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..evaluation.records import table
from ..untrusted import without_secrets

JOINERS = "\u200c\u200d"  # not printable, but a part of words and of emoji
# A backslash does not disable `&` and `<`; `_` inside words has no meaning.
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")


class Markdown(str):
    """Text that is markdown, and is not escaped again."""


def plain(text: Any) -> str:
    """A text in one line, without control characters, passwords and tokens; for metadata."""
    line = re.sub(r"\s+", " ", str(text))
    return without_secrets("".join(letter for letter in line if letter.isprintable() or letter in JOINERS))


def escaped(text: Any) -> Markdown:
    """A text that a card shows as it is: no markup, no HTML, no link, no end of a table's cell."""
    if isinstance(text, Markdown):
        return text
    marked = SPECIAL.sub(lambda found: f"\\{found[0]}", plain(text))
    return Markdown("".join(ENTITIES.get(letter, letter) for letter in marked).replace("://", "&#58;//"))


def code(text: Any) -> Markdown:
    """A text as inline code; not for a table's cell, which a `|` in it would end."""
    inside = plain(text)
    ticks = "`" * (_longest_run(inside) + 1)
    space = " " if inside[:1] == "`" or inside[-1:] == "`" or not inside else ""
    return Markdown(f"{ticks}{space}{inside}{space}{ticks}")


def fenced(text: Any, language: str) -> Markdown:
    """One line of code in a block of its own."""
    inside = plain(text)
    ticks = "`" * max(3, _longest_run(inside) + 1)
    return Markdown(f"{ticks}{language}\n{inside}\n{ticks}")


def quoted(text: str | None) -> Markdown:
    """A Python string literal; invisible characters, and backticks that could end the code, become escapes."""
    written = json.dumps(text and without_secrets(text), ensure_ascii=False)
    hidden = {"`"} if "```" in written else set()
    return Markdown("".join(_escape(each) if each in hidden or not each.isprintable() else each for each in written))


def cells(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markdown:
    """A table."""
    return Markdown("\n".join(table(list(map(escaped, head)), [list(map(escaped, row)) for row in rows])))


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _escape(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"
