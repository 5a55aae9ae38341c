"""Fills the page in and writes it. All text is escaped, and nothing in it can reach the network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..config.fields import settings_of
from ..config.presets import DERIVED
from ..config.record import shown_arguments, training_record
from ..config.run_config import subjects_of
from ..folders import write_whole
from ..untrusted import without_secrets
from .curves import COURSE, QUALITY, REWARDS, TRAINING, health_charts, metric_charts
from .images import Grids
from .rows import HEALTH_FILE, METRICS_FILE, VALIDATION, read_rows

REPORT = "report.html"
HERE = Path(__file__).parent
SECTIONS = (QUALITY, TRAINING, REWARDS, COURSE)
COLUMNS = {  # of metrics.json
    "nfe": "network calls", "fd_to_teacher": "distance to the teacher", "fd_to_data": "distance to the data",
    "prompt_accuracy": "prompt accuracy", "seconds_per_image": "seconds per image",
}  # fmt: skip
SUBJECTS = {"teacher": "teacher", "teacher_few_step": "teacher, few steps", "student": "student"}


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Args:
        state: `running`, `trained` (to the last update), `stopped`, `failed` or `finished` (with its metrics).
        update: how many updates are done.
        sentence: why it stopped or failed.
    """

    state: str
    update: int
    sentence: str = ""


class Report:
    """The page of one run, made of the files in its folder.

    Args:
        folder: the run's.
        arguments: the run's, as its checkpoints record them.
        prompts: of the validation images.
        best: the name of `--metric_for_best_model`'s values, and whether more of it is better; None without it.
    """

    def __init__(
        self, folder: Path, arguments: Mapping[str, Any], prompts: list[str], best: tuple[str, bool] | None = None
    ) -> None:
        self.folder, self.arguments, self.prompts, self.best = folder, dict(arguments), prompts, best
        self._grids = Grids(folder / VALIDATION)
        self._latest = Status("running", 0)

    def finish(self) -> Path:
        """Writes the page of a run whose student is exported and measured; what was said of its training stays."""
        return self.write(replace(self._latest, state="finished"))

    def write(self, status: Status) -> Path:
        """Writes `report.html` as a whole or not at all; OSError if it cannot be written."""
        self._latest = status
        path = self.folder / REPORT
        write_whole(path, self.as_html(status))
        return path

    def as_html(self, status: Status) -> str:
        """The page."""
        script, style = ((HERE / name).read_text("utf-8") for name in ("page.js", "page.css"))
        template = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
        return template.get_template("page.html").render(
            script=script,
            style=style,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            **self._contents(status),
        )

    def _contents(self, status: Status) -> dict[str, Any]:
        """What the template shows."""
        arguments = self.arguments
        health = read_rows(self.folder / arguments["logging_dir"] / HEALTH_FILE, until=status.update)
        measured = read_rows(self.folder / VALIDATION / METRICS_FILE, until=status.update)
        charts = [*metric_charts(measured), *health_charts(health)]
        grids, left_out = self._grids.chosen(until=status.update)
        alarms = [(row["update"], text) for row in health for text in row.get("alarms", [])]
        record = training_record(arguments, status.update)
        return {
            "name": self.folder.resolve().name,
            "status": status,
            "sentence": without_secrets(status.sentence),
            "total": arguments["max_train_steps"],
            "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "run": record["arguments"],
            "command": record["command"],
            "tiles": list(self._tiles(health, measured)),
            "sections": [each for each in SECTIONS if any(chart.section == each for chart in charts)],
            "charts": [asdict(chart) for chart in charts],
            "marks": {"alarms": [update for update, _ in alarms], "best": self._best_update(measured)},
            "grids": [{**asdict(grid), "alt": self._alt(grid.update)} for grid in grids],
            "left_out": left_out,
            "prompts": self.prompts,
            "alarms": alarms,
            "changed": list(self._settings(only_changed=True)),
            "settings": list(self._settings()),
            "metrics": self._final_metrics() if status.state == "finished" else [],
            "columns": COLUMNS,
        }

    def _alt(self, update: int) -> str:
        return f"The student's images after {update} updates, from left to right: {'; '.join(self.prompts)}"

    def _best_update(self, measured: list[dict[str, Any]]) -> int | None:
        """The first update with the best value of `--metric_for_best_model`."""
        if self.best is None:
            return None
        name, more = self.best
        known = [row for row in measured if isinstance(row.get(name), int | float)]
        if not known:
            return None
        best = (max if more else min)(row[name] for row in known)
        return next(row["update"] for row in known if row[name] == best)

    def _tiles(self, health: list[dict[str, Any]], measured: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
        """The most important numbers: what, value, remark."""
        best = self._best_update(measured)
        for name, value in measured[-1].items() if measured else ():
            if name != "update":
                yield name, _shown(value), _beside_best(name, measured, best)
        latest: dict[str, Any] = {name: value for row in health for name, value in row.items()}
        for name, title in (("distance", "distance to the teacher"), ("fake_loss", "fake score's loss")):
            if not measured and name in latest:
                yield title, _shown(latest[name]), "the last"
        if "seconds_per_update" in latest:
            yield "seconds per update", _shown(latest["seconds_per_update"]), "mean"
        if "peak_memory_gib" in latest:
            yield "peak memory", f"{_shown(latest['peak_memory_gib'])} GiB", ""

    def _settings(self, only_changed: bool = False) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """For each subject its flags and their values, without folders and secrets."""
        shown = shown_arguments(self.arguments)
        for subject, kind in subjects_of(shown["student"]).items():
            rows = []
            for each in settings_of(kind):
                value = shown.get(each.name)
                default = None if each.is_repeatable else each.default
                if value is not None and not (only_changed and (each.name in DERIVED or value == default)):
                    rows.append((each.option, _shown(value)))
            if rows:
                yield subject, rows

    def _final_metrics(self) -> list[tuple[str, list[str]]]:
        """The rows of `metrics.json`, an empty list if there is none."""
        try:
            record = json.loads((self.folder / "metrics.json").read_text("utf-8"))
            return [(text, [_shown(record[key].get(each)) for each in COLUMNS]) for key, text in SUBJECTS.items()]
        except (OSError, ValueError, KeyError, AttributeError):
            return []


def _beside_best(name: str, measured: list[dict[str, Any]], best: int | None) -> str:
    """What is said beside the last value of a metric."""
    last = measured[-1]["update"]
    if best in (None, last):
        return f"at update {last:,}" + (", the best" if best else "")
    value = next((row.get(name) for row in measured if row["update"] == best), None)
    return f"at update {last:,}; {_shown(value)} at the best, {best:,}"


def _shown(value: Any) -> str:
    """A value in words: four digits of a number, a dash for None, lists with commas."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
