"""Kinds of damage to a file: a flipped bit, a cut, no content, no file, a block of zeros, another file in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

BLOCK = 512  # bytes that a disk writes at once


def flipped(path: Path, rng: Random, other: Path | None) -> str:
    """One bit, anywhere."""
    content = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {len(content)} flipped"


def cut(path: Path, rng: Random, other: Path | None) -> str:
    """The end is missing."""
    content = path.read_bytes()
    size = rng.randrange(1, max(2, len(content)))
    path.write_bytes(content[:size])
    return f"cut to {size} of {len(content)} bytes"


def emptied(path: Path, rng: Random, other: Path | None) -> str:
    """No content."""
    path.write_bytes(b"")
    return "emptied"


def missing(path: Path, rng: Random, other: Path | None) -> str:
    """No file."""
    path.unlink()
    return "removed"


def zeroed(path: Path, rng: Random, other: Path | None) -> str:
    """Zeros in a block, as after a loss of power."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content)) // BLOCK * BLOCK
    size = len(content[start : start + BLOCK])
    content[start : start + size] = bytes(size)
    path.write_bytes(content)
    return f"{size} bytes from {start} zeroed"


def swapped(path: Path, rng: Random, other: Path | None) -> str:
    """Another's file of this kind in its place."""
    assert other is not None
    path.write_bytes(other.read_bytes())
    return f"replaced by {other.parent.name}/{other.name} of another"


DAMAGES: dict[str, Callable[[Path, Random, Path | None], str]] = {
    damage.__name__: damage for damage in (flipped, cut, emptied, missing, zeroed, swapped)
}
