"""`evaluation.json`: metrics, and every setting that affects them; as a table, and two of them side by side.

Records hold a SHA-256 digest of themselves, and digests of the prompts, networks and files that they are about.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..folders import write_whole
from ..untrusted import digest_of, parse_object

JSON_FILE, TABLE_FILE = "evaluation.json", "evaluation.md"
OWN_DIGEST = "sha256"  # a record's entry
SAMPLED = 1024  # how many numbers of each tensor identify a network
NOTE = "All numbers are of the picture files, 8 bits a channel, so that drawn and given pictures are measured alike."
Row = tuple[float | None, float | None, str]  # value, standard error, 95% interval in words


def digest_of_texts(texts: Sequence[str]) -> str:
    """SHA-256 of texts in their order."""
    parts = (text.encode(errors="surrogatepass") for text in texts)
    return _digest(len(part).to_bytes(8) + part for part in parts)


def digest_of_tensors(tensors: Mapping[str, Tensor], most: int | None = None) -> str:
    """SHA-256 of names, shapes, dtypes and numbers; the file format does not matter.

    Args:
        tensors: by name, for example a `state_dict`.
        most: how many evenly spaced numbers of each tensor are read, at least 2; all by default.
    """

    def parts() -> Iterator[bytes]:
        for name in sorted(tensors):
            tensor = tensors[name].detach().flatten()
            if most is not None and len(tensor) > most:
                tensor = tensor[torch.arange(most, device=tensor.device) * (len(tensor) - 1) // (most - 1)]
            yield f"{name} {list(tensors[name].shape)} {tensor.dtype}".encode()
            yield tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()

    return _digest(parts())


def digest_of_files(files: Sequence[Path]) -> str:
    """SHA-256 of files' contents in their order; their names do not matter."""
    return _digest(hashlib.sha256(file.read_bytes()).digest() for file in files)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as JSON returns it, with the digest of its contents."""
    plain = json.loads(json.dumps(record))
    return {**plain, OWN_DIGEST: digest_of(plain)}


def unsealed(text: str) -> dict[str, Any]:
    """The record in a JSON text, without its digest; records of version 0.1.0 have none.

    Raises:
        ValueError: if the text is no JSON object, or was changed since it was written.
    """
    record = parse_object(text)
    digest = record.pop(OWN_DIGEST, None)
    if digest is not None and digest != digest_of(record):
        raise ValueError("it was changed since it was written")
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes `evaluation.md`, then `evaluation.json`; after a kill each is complete or as it was."""
    write_whole(folder / TABLE_FILE, as_markdown(record))
    write_whole(folder / JSON_FILE, json.dumps(record, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The record in an `evaluation.json`, or in that of a folder.

    Raises:
        ValueError: if there is none, if it was changed since it was written, or if it lacks an entry.
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
        raise ValueError(f"{path} is not a record of rdm-evaluate ({error}); give its {JSON_FILE}.") from error
    return record


def rows_of(metrics: Mapping[str, Any]) -> dict[str, Row]:
    """Metric -> its value, its standard error, and its 95% interval in words."""
    rows: dict[str, Row] = {}
    for name, measured in metrics.items():
        if name == "rewards":
            rows |= {each: _row_of_mean(reward["mean"], reward["standard_error"]) for each, reward in measured.items()}
        elif isinstance(measured, Mapping):
            interval = _interval(measured["low"], measured["high"])
            rows[name] = (measured["value"], measured["standard_error"], interval)
            rows[f"{name}, extrapolated"] = (measured["extrapolated"], measured["standard_error"], "")
        else:
            rows[name] = (measured, None, "")
    return rows


def _row_of_mean(mean: float | None, error: float | None) -> Row:
    if mean is None or error is None:
        return mean, None, ""
    return mean, error, _interval(mean - 1.96 * error, mean + 1.96 * error)


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None else f"{low:.4g} to {high:.4g}"


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def as_markdown(record: Mapping[str, Any]) -> str:
    """A record as a table of its metrics and a table of its settings."""
    rows = [[name, number(value), interval] for name, (value, _, interval) in rows_of(record["metrics"]).items()]
    settings = [[name, str(value)] for name, value in flattened({**record["subject"], **record["settings"]})]
    metrics = table(["", "value", "95% interval"], rows)
    lines = [f"# {record['subject']['name']}", "", *metrics, "", *record["notes"], ""]
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
    """Two records of evaluations side by side, as a table.

    Args:
        a, b: the records.
        ignore: settings that may differ, with all their parts: `versions`, or `versions.torch`.

    Raises:
        ValueError: if other settings differ, naming each with both values.
    """
    left, right = dict(flattened(a["settings"])), dict(flattened(b["settings"]))
    differing = [name for name in dict.fromkeys([*left, *right]) if left.get(name) != right.get(name)]
    differing = [name for name in differing if not any(f"{name}.".startswith(f"{each}.") for each in ignore)]
    if differing:
        both = "; ".join(f"{name} is {left.get(name)} and {right.get(name)}" for name in differing)
        raise ValueError(
            f"These two evaluations cannot be compared, because their settings differ: {both}. Evaluate one again with "
            "the other's settings, or allow differences with --ignore NAME."
        )
    names = [f"{record['subject']['kind']} {record['subject']['name']}" for record in (a, b)]
    left_rows, right_rows = rows_of(a["metrics"]), rows_of(b["metrics"])
    rows = [[name, *_difference(left_rows[name], right_rows[name])] for name in left_rows if name in right_rows]
    return "\n".join(table(["", *names, "difference"], rows))


def _difference(a: Row, b: Row) -> list[str]:
    """Both values and the second minus the first, with its standard error as if the pictures were independent."""
    if a[0] is None or b[0] is None:
        return [number(a[0]), number(b[0]), "-"]
    error = "" if a[1] is None or b[1] is None else f" ± {(a[1] ** 2 + b[1] ** 2) ** 0.5:.2g}"
    return [number(a[0]), number(b[0]), f"{b[0] - a[0]:+.4g}{error}"]
