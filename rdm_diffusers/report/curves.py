"""The numbers of a run as charts: which lines go together, and which of many points are shown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_POINTS = 300  # of a line
DIGITS = 5  # of a number
NOT_NUMBERS = ("update", "alarms")
QUALITY, TRAINING, REWARDS, COURSE = "Validation", "Training", "Rewards", "Learning rates and speed"

# Pattern of the numbers' names; title; what it says; section. A group in the pattern is a part of the title.
# fmt: off
CHARTS: tuple[tuple[str, str, str, str], ...] = (
    (r"distance", "Distance to the teacher", "mean |student - teacher| at re-noised samples, as x0", TRAINING),
    (r"consistency_loss(?:/.+)?", "Consistency loss", "how far x0 is from the target, also by the student's steps",
     TRAINING),
    (r"fake_loss", "The fake score's loss", "denoising loss on the student's own samples", TRAINING),
    (r"bias_share(?:/.+)?", "The fake score's bias", "share of its squared error; an alarm above 0.5", TRAINING),
    (r"contrast", "Contrast", "standard deviation of the last step's x0", TRAINING),
    (r"reward_over_distance|correction_over_reward", "R_dm", "its size beside the distance, its correction's beside it",
     TRAINING),
    (r"log_ratio", "Log ratio", "R_dm as one number; 0 where teacher and fake score agree", TRAINING),
    (r"(?:student|fake)_grad_norm", "Gradient norms", "before clipping", TRAINING),
    (r"fake_loss/.+", "The fake score's loss by noise", "in four bins of the noising time, the least noise first",
     TRAINING),
    (r"reward/([^/]+)(?:/.+)?", "Reward {}", "mean over the samples", REWARDS),
    (r"reward_std/([^/]+)(?:/.+)?", "Spread of {}", "standard deviation within a group", REWARDS),
    (r"reward_share_effective", "The rewards' share", "of a step, beside R_dm", REWARDS),
    (r"reward_cosine/.+", "Cosines", "of the rewards' gradients with R_dm", REWARDS),
    (r"reward_invalid/.+", "Invalid values", "share of the samples without a finite reward", REWARDS),
    (r"learning_rate/.+", "Learning rates", "of both roles", COURSE),
    (r"seconds_per_update", "Seconds per update", "mean since the start or the resumption", COURSE),
    (r"images_per_second", "Images per second", "of all processes", COURSE),
    (r"peak_memory_gib", "Peak memory", "GiB of the device, or of the process", COURSE),
    (r"network_calls/.+", "Network calls", "samples through each role", COURSE),
)
# fmt: on


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    name: str
    x: list[int]
    y: list[float]


@dataclass
class Chart:
    """Lines that share their axes.

    Args:
        title, note: above it.
        section: of the page.
        lines: in the order of the numbers.
    """

    title: str
    note: str
    section: str
    lines: list[Line] = field(default_factory=list)


def health_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The charts of the health numbers, in the order of `CHARTS`; numbers that are unknown there come last."""
    charts: dict[tuple[int, str], Chart] = {}
    for name in _names(rows):
        place, title, note, section = _chart_of(name)
        chart = charts.setdefault((place, title), Chart(title, note, section))
        chart.lines.append(_line(rows, name, _label(name)))
    return [chart for _, chart in sorted(charts.items(), key=lambda item: item[0][0]) if any(c.x for c in chart.lines)]


def metric_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """A chart for each validation metric."""
    lines = [_line(rows, name, name) for name in _names(rows)]
    return [Chart(line.name, "the student's moving average", QUALITY, [line]) for line in lines if line.x]


def thinned(x: list[int], y: list[float]) -> tuple[list[int], list[float]]:
    """At most `MOST_POINTS` points: the lowest and the highest of each of equally long stretches, and both ends."""
    if len(x) <= MOST_POINTS:
        return x, y
    kept, stretches = {0, len(x) - 1}, MOST_POINTS // 2 - 1
    for i in range(stretches):
        stretch = range(i * len(x) // stretches, (i + 1) * len(x) // stretches)
        kept |= {min(stretch, key=y.__getitem__), max(stretch, key=y.__getitem__)}
    return [x[i] for i in sorted(kept)], [y[i] for i in sorted(kept)]


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name not in NOT_NUMBERS))


def _line(rows: Iterable[Mapping[str, Any]], name: str, label: str) -> Line:
    known = [(row["update"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    x, y = thinned([update for update, _ in known], [value for _, value in known])
    return Line(label, x, [float(f"{value:.{DIGITS}g}") for value in y])


def _chart_of(name: str) -> tuple[int, str, str, str]:
    for place, (pattern, title, note, section) in enumerate(CHARTS):
        match = re.fullmatch(pattern, name)
        if match:
            return place, title.format(*match.groups()), note, section
    return len(CHARTS), name.split("/")[0], "", TRAINING


def _label(name: str) -> str:
    """`step 1` of `bias_share/step_1`, `mean` of what has no part of its own, `student` of `learning_rate/student`."""
    *_, last = name.split("/")
    return last.replace("_", " ")
