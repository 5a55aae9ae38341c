"""Prompts from text files, one a line."""

from __future__ import annotations

import codecs
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

MARKED = {  # byte-order marks; UTF-32's goes first, because it begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MARK = "\ufeff"
LINE_END = re.compile(r"\r\n|\r|\n")  # and no other of those at which `str.splitlines` cuts
LONG = 10_000  # characters, more than the tokens of any text encoder hold
CONVERT = "convert it, for example with iconv -f WINDOWS-1252 -t UTF-8"


def read_prompts(path: Path, flag: str) -> list[str]:
    """The prompts of a text file, one a line, stripped; blank lines are skipped.

    The text is UTF-8, with or without a byte-order mark, or UTF-16 or UTF-32 with one. A line ends at a line feed, at a
    carriage return, or at both.

    Args:
        path: the file.
        flag: the flag that names it, for error messages.

    Raises:
        ValueError: one sentence, if the file is missing, is not text, or holds no prompts.
    """
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise ValueError(f"{flag} {path} {what}; give a text file with one prompt a line.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read ({error.strerror}); give another file.") from error
    prompts = [cleaned(line) for line in LINE_END.split(_decoded(content, f"{flag} {path}"))]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"{flag} {path} holds no prompts; write one a line.")
    warn_of_long(prompts, f"{flag} {path}")
    return prompts


def cleaned(text: str) -> str:
    """A prompt, stripped, without the byte-order mark that joined files contain."""
    return text.strip().removeprefix(MARK).strip()


def warn_of_long(prompts: Sequence[str], source: str) -> None:
    """Warns about prompts that are longer than any text encoder reads."""
    long = [prompt for prompt in prompts if len(prompt) > LONG]
    if long:
        warnings.warn(
            f"{source} holds {len(long)} prompts of more than {LONG:,} characters, the first begins {long[0][:40]!r}; "
            "the text encoders read only their beginning.",
            stacklevel=3,
        )


def _decoded(content: bytes, source: str) -> str:
    encoding = next((name for mark, name in MARKED.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = _lines(content[: error.start].decode(encoding, "ignore"))
        raise ValueError(
            f"{source} is no {encoding.upper()} text, because of the byte 0x{content[error.start]:02x} in line {line}; "
            f"{CONVERT}."
        ) from error
    if "\0" in text:
        line = _lines(text[: text.index("\0")])
        raise ValueError(
            f"{source} holds a NUL character in line {line}, as UTF-16 without a byte-order mark does, and files that "
            "are no text; save it as UTF-8."
        )
    return text


def _lines(before: str) -> int:
    """The number of the line that a text ends in, from 1."""
    return len(LINE_END.split(before))
