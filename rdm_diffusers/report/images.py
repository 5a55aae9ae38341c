"""The validation images of a run, small enough to be a part of a page."""

from __future__ import annotations

import base64
import io
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

MOST_IMAGES = 24
WIDEST = 1200  # pixels
SECONDS = 0.6  # for reading new ones, at each writing of the page


@dataclass(frozen=True)
class Grid:
    """A grid of validation images: its update, and the address in which it is contained."""

    update: int
    source: str


@dataclass
class Grids:
    """The grids in a folder, each read once.

    Args:
        folder: with `step-N.png`.
    """

    folder: Path
    _read: dict[tuple[int, int], Grid] = field(default_factory=dict)  # by update and time of the file

    def chosen(self, until: int) -> tuple[list[Grid], str]:
        """Grids of updates up to `until`, the oldest first, and a sentence on those that are left out.

        Of many, every second, fourth, eighth and so on is chosen, and the last, so that few are read anew each time.
        """
        found = sorted((n, path) for path in self.folder.glob("step-*.png") if (n := _number(path)) <= until)
        stride = 1
        while len(found[:-1:stride]) >= MOST_IMAGES:
            stride *= 2
        wanted = found[:-1:stride] + found[-1:]
        deadline, grids = time.monotonic() + SECONDS, []
        for number, path in reversed(wanted):  # if time is short, the newest count most
            key = number, path.stat().st_mtime_ns
            if key not in self._read and time.monotonic() < deadline:
                self._read[key] = Grid(number, as_address(path))
            if key in self._read and self._read[key].source:
                grids.append(self._read[key])
        left = len(found) - len(grids)
        return grids[::-1], f"{left} of {len(found)} grids are left out here; all are in validation/." if left else ""


def as_address(path: Path) -> str:
    """A picture as a `data:` address: PNG, or JPEG with at most `WIDEST` pixels a row if it is large.

    A file that cannot be read has an empty address.
    """
    try:
        with Image.open(path) as picture:
            if picture.width <= WIDEST and path.stat().st_size < 2**17:
                return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
            small, buffer = picture.convert("RGB"), io.BytesIO()
            small.thumbnail((WIDEST, WIDEST), reducing_gap=2.0)
            small.save(buffer, "JPEG", quality=85)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _number(path: Path) -> int:
    match = re.fullmatch(r"step-(\d+)\.png", path.name)
    return int(match[1]) if match else 10**12
