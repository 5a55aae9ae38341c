"""Numbers of a run as files of one JSON object a line, which a resumed run continues without a gap or a repetition."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..folders import write_whole
from ..program import one_line

HEALTH_FILE = "health.jsonl"  # in the folder of the logs
VALIDATION, METRICS_FILE = "validation", "metrics.jsonl"  # in the folder of the validation images
Row = dict[str, Any]  # with its `update`


def as_line(row: Mapping[str, Any]) -> str:
    """A row as a line of JSON; numbers that are not finite, which JSON does not have, become null."""
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


def read_rows(path: Path, until: int | None = None) -> list[Row]:
    """The rows of a file up to an update, all by default; without a last line that a kill cut off.

    An empty list if there is no such file.
    """
    rows = []
    if path.is_file():
        for line in path.read_text("utf-8", "replace").splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("update"), int):
                    rows.append(row)
    return [row for row in rows if until is None or row["update"] <= until]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of rows as a whole; none is left where there are no rows."""
    text = "".join(map(as_line, rows))
    if text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    elif path.exists():
        path.unlink()


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row at the end of a file; an error of the disk becomes a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(as_line(row))
    except OSError as error:
        warnings.warn(f"{path} took no numbers ({one_line(error)}); the run goes on.", stacklevel=2)
