"""`evaluation.json`: numbers, and every setting that moves one; the same as a table; two of them side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..folders import write_whole
from .sealing import unsealed

JSON_FILE, TABLE_FILE = "evaluation.json", "evaluation.md"
NOTE = "All numbers are of the picture files, 8 bits a channel, so that drawn and given pictures are measured alike."


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes `evaluation.md` and, last of all, `evaluation.json`, each as a whole."""
    write_whole(folder / TABLE_FILE, as_markdown(record))
    write_whole(folder / JSON_FILE, json.dumps(record, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """An `evaluation.json`, or that of a folder.

    Raises:
        ValueError: if there is none, or if it was changed since it was written.
    """
    path = path / JSON_FILE if path.is_dir() else path
    try:
        record = unsealed(path.read_text(encoding="utf-8"))
        if not all(isinstance(record.get(part), dict) for part in ("settings", "metrics", "subject")):
            raise ValueError("it has no settings, metrics and subject")
        for value, error, _ in rows_of(record["metrics"]).values():
            number(value), number(error)
        if not {"kind", "name"} <= record["subject"].keys():
            raise ValueError("its subject has no name")
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no JSON of rdm-evaluate ({error}); give its {JSON_FILE}.") from error
    return record


def rows_of(metrics: Mapping[str, Any]) -> dict[str, tuple[float | None, float | None, str]]:
    """Metric -> its value, its standard error, and its 95% interval in words."""
    rows: dict[str, tuple[float | None, float | None, str]] = {}
    for name, measured in metrics.items():
        if name == "rewards":
            rows |= {each: _row_of_mean(reward) for each, reward in measured.items()}
        elif isinstance(measured, Mapping):
            rows[name] = (measured["value"], measured["standard_error"], _interval(measured))
            rows[f"{name}, extrapolated"] = (measured["extrapolated"], measured["standard_error"], "")
        else:
            rows[name] = (measured, None, "")
    return rows


def _row_of_mean(reward: Mapping[str, float | None]) -> tuple[float | None, float | None, str]:
    mean, error = reward["mean"], reward["standard_error"]
    if mean is None or error is None:
        return mean, None, ""
    return mean, error, _interval({"low": mean - 1.96 * error, "high": mean + 1.96 * error})


def _interval(measured: Mapping[str, Any]) -> str:
    return "" if measured["low"] is None else f"{measured['low']:.4g} to {measured['high']:.4g}"


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def as_markdown(record: Mapping[str, Any]) -> str:
    """A record as a table of its metrics and a table of its settings."""
    rows = [[name, number(value), interval] for name, (value, _, interval) in rows_of(record["metrics"]).items()]
    lines = [
        f"# {record['subject']['name']}",
        "",
        *table(["", "value", "95% interval"], rows),
        "",
        *record["notes"],
        "",
    ]
    told = {**record["subject"], **record["settings"]}
    settings = [[name, str(value), ""][:2] for name, value in flattened(told)]
    return "\n".join([*lines, *table(["setting", "value"], settings)]) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings with dotted names: `features.resize`."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def compare(a: Mapping[str, Any], b: Mapping[str, Any], ignore: Sequence[str] = ()) -> str:
    """Two records side by side, as a table.

    Args:
        a, b: records of evaluations.
        ignore: settings that may differ, with all that is under them: `versions`, `versions.torch`.

    Raises:
        ValueError: if another setting that moves a number differs, naming each with both values.
    """
    left, right = dict(flattened(a["settings"])), dict(flattened(b["settings"]))
    unlike = [name for name in dict.fromkeys([*left, *right]) if left.get(name) != right.get(name)]
    unlike = [name for name in unlike if not any(f"{name}.".startswith(f"{each}.") for each in ignore)]
    if unlike:
        told = "; ".join(f"{name} is {left.get(name)} and {right.get(name)}" for name in unlike)
        raise ValueError(
            f"These two evaluations cannot be compared, their settings differ: {told}. Evaluate one anew with the "
            "other's, or let them differ with --ignore NAME."
        )
    names = [f"{record['subject']['kind']} {record['subject']['name']}" for record in (a, b)]
    ours, theirs = rows_of(a["metrics"]), rows_of(b["metrics"])
    rows = [[name, *_pair(ours[name], theirs[name])] for name in ours if name in theirs]
    return "\n".join(table(["", *names, "difference"], rows))


def _pair(a: tuple[float | None, float | None, str], b: tuple[float | None, float | None, str]) -> list[str]:
    """Both values and the second less the first, with its standard error as if the pictures were independent."""
    if a[0] is None or b[0] is None:
        return [number(a[0]), number(b[0]), "-"]
    error = "" if a[1] is None or b[1] is None else f" ± {(a[1] ** 2 + b[1] ** 2) ** 0.5:.2g}"
    return [number(a[0]), number(b[0]), f"{b[0] - a[0]:+.4g}{error}"]
