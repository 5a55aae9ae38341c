"""The few-step benchmark's page: `python benchmarks/few_step_page.py`, in the repository's root.

Writes the tables of `results/few_step_benchmark.json` into `docs/benchmark.md`, between the comments `study: <name>`
and `end`, and draws its curves and pictures, `docs/images/benchmark_*.png`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from few_step_benchmark import MARKS, PICTURES, RESULT
from few_step_methods import BASELINE, GUIDANCE, METHODS, PICTURED_STEPS, STEPS, TEACHERS, Plan, scale_of
from few_step_results import METRIC, finals
from pages import Line, draw_lines, markdown_table, plus_minus, write_between
from runs import ROOT, standard_error

from rdm_diffusers.evaluation.pictures import labelled_rows, read_image

PAGE = ROOT / "docs" / "benchmark.md"
IMAGES = ROOT / "docs" / "images"
CALLS_FIGURE, STEPS_FIGURE = "benchmark_calls.png", "benchmark_steps.png"
ABBREVIATED = {"learning_rate": "", "fake_learning_rate": "fake score ", "fake_updates_per_step": "fake updates "}
Summary = dict[str, dict[str, dict[str, dict[str, Any]]]]  # teacher, guidance, steps, method


def heading(teacher: str, guidance: str) -> str:
    scale = scale_of(teacher, guidance)
    return f"### {teacher}, guidance {guidance}" + ("" if scale == 1 else f" ({scale:g})")


def sections(summary: Summary) -> list[tuple[str, str, dict[str, dict[str, Any]]]]:
    """The teachers and guidances that have results, with those by steps."""
    return [
        (teacher, guidance, summary[teacher][guidance])
        for teacher in TEACHERS
        for guidance in GUIDANCE
        if guidance in summary.get(teacher, {})
    ]


def named(steps: str) -> str:
    return f"{steps} step" if steps == "1" else f"{steps} steps"


def distances(by_steps: dict[str, dict[str, Any]], teacher: Mapping[str, Any] | None) -> str:
    """A row a method: the distance at each number of steps, the least of each column in bold, and its seeds."""
    least = {
        steps: min((entry["mean"][METRIC] for entry in cell.values() if "mean" in entry), default=None)
        for steps, cell in by_steps.items()
    }

    def cell_of(steps: str, method: str) -> str:
        entry = by_steps[steps].get(method)
        if entry is None:
            return ""
        lost = f" ({len(entry['diverged'])} diverged)" if entry["diverged"] else ""
        if "mean" not in entry:
            return lost.strip()
        text = f"{entry['mean'][METRIC]:.2f}{plus_minus(entry['standard_error'][METRIC], 2)}"
        return (f"**{text}**" if entry["mean"][METRIC] == least[steps] else text) + lost

    rows = [
        [method, *(cell_of(steps, method) for steps in by_steps), seeds_of(by_steps, method)] for method in METHODS
        if any(method in cell for cell in by_steps.values())
    ]  # fmt: skip
    if teacher is not None:
        rows.append(["the teacher, 50 steps", *[f"{teacher[METRIC]:.2f}"] * len(by_steps), ""])
    return markdown_table(["fd_to_teacher", *map(named, by_steps), "seeds"], rows)


def seeds_of(by_steps: dict[str, dict[str, Any]], method: str) -> str:
    """How many seeds stand, of all numbers of steps."""
    counts = [len(cell[method]["seeds"]) for cell in by_steps.values() if method in cell]
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def changes(by_steps: dict[str, dict[str, Any]], other: Mapping[str, str]) -> str:
    """A row a method: the paired change of the distance against another method, by steps."""

    def change_of(cell: dict[str, Any], method: str) -> str:
        change = cell.get(method, {}).get(f"against_{other[method]}")
        return f"{change['change_100_ln']:+.0f}{plus_minus(change['standard_error'])}" if change else ""

    rows = [[method, *(change_of(cell, method) for cell in by_steps.values())] for method in METHODS if method in other]
    return markdown_table(["change, 100 ln", *map(named, by_steps)], [row for row in rows if any(row[1:])])


def settings(by_steps: dict[str, dict[str, Any]]) -> str:
    """A row a method: the search's choice, what a run costs, and the share of right pictures, at 4 steps or fewer."""
    steps = max((steps for steps in by_steps if int(steps) <= 4), key=int, default=next(iter(by_steps)))
    rows = []
    for method, entry in by_steps[steps].items():
        if "mean" not in entry:
            continue
        calls, updates = entry["network_calls"], entry["updates"]
        rows.append([
            method, words(entry["choice"]), f"{calls / updates:,.0f}", f"{updates:,.0f}",
            f"{sum(entry['preparation'].values()):,}", f"{entry['mean']['prompt_accuracy']:.3f}",
        ])  # fmt: skip
    columns = ["learning rate and fake score", "calls an update", "updates", "calls before", "prompt accuracy"]
    return markdown_table([named(steps), *columns], rows)


def words(choice: Mapping[str, Any]) -> str:
    """A choice of the search, in words."""
    shown = {name: value if isinstance(value, str) else f"{value:g}" for name, value in choice.items()}
    return ", ".join(f"{ABBREVIATED.get(name, name + ' ')}{value}" for name, value in shown.items())


def searched(record: dict[str, Any]) -> str:
    """A row a method and teacher: how many settings its search has tried, and the best of them."""
    found: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for key, run in record["runs"].items():
        stage, teacher, guidance, steps, method, *_ = key.split("/")
        if stage == "search" and run["finite"]:
            found.setdefault((teacher, guidance, steps, method), []).append(run)
    rows = []
    for cell, runs in sorted(found.items(), key=lambda each: (each[0][:3], list(METHODS).index(each[0][3]))):
        best = min(runs, key=lambda run: run["final"][METRIC])
        distance, accuracy = best["final"][METRIC], best["final"]["prompt_accuracy"]
        rows.append([cell[3], *cell[:3], str(len(runs)), words(best["choice"]), f"{distance:.2f}", f"{accuracy:.3f}"])
    columns = [
        "method",
        "teacher",
        "guidance",
        "steps",
        "settings tried",
        "the best of them",
        METRIC,
        "prompt accuracy",
    ]
    return markdown_table(columns, rows)


def tables(record: dict[str, Any], folder: Path = PICTURES) -> dict[str, str]:
    """What stands between the page's comments; `folder` has the students' pictures."""
    parts: dict[str, list[str]] = {"results": [], "correction": [], "settings": []}
    for teacher, guidance, by_steps in sections(record["summary"]):
        floor = record["teachers"].get(teacher, {}).get(guidance, {}).get(str(record["plan"]["images"]))
        title = heading(teacher, guidance)
        against = changes(by_steps, {method: BASELINE for method in METHODS if method != BASELINE})
        parts["results"] += [title, distances(by_steps, floor), f"Against {BASELINE}, paired by seed:", against]
        if pictured(teacher, guidance, folder):
            parts["results"].append(shown(f"Pictures of the students of {teacher}", strip_name(teacher, guidance)))
        parts["correction"] += [title, changes(by_steps, {m: e.corrected for m, e in METHODS.items() if e.corrected})]
        parts["settings"] += [title, settings(by_steps)]
    if parts["results"]:
        parts["results"] += [shown("The distance over network calls", CALLS_FIGURE),
                             shown("The distance over the student's steps", STEPS_FIGURE)]  # fmt: skip
    written = {name: "\n\n".join(each) or "No method has a finished run yet." for name, each in parts.items()}
    written["search"] = searched(record)
    return written | {"runs": runs_table(record), "machine": machines(record)}


def shown(text: str, file: str) -> str:
    return f"![{text}](images/{file})"


def runs_table(record: dict[str, Any]) -> str:
    """How many runs stand, and their time."""
    rows = []
    for stage in ("search", "final"):
        seconds = [run["processor_seconds"] for key, run in record["runs"].items() if key.startswith(f"{stage}/")]
        rows.append([stage, str(len(seconds)), f"{sum(seconds) / 3600:.1f}"])
    return markdown_table(["stage", "runs", "hours of one core"], rows)


def machines(record: dict[str, Any]) -> str:
    """The last command, and a line for each machine with its libraries."""
    return "\n".join(["```", record["command"], *record["machines"], "```"])


def styles() -> dict[str, dict[str, Any]]:
    """A colour for each method, and the same one dashed for it with the correction."""
    plain = [name for name, each in METHODS.items() if each.corrected is None]
    return {
        name: {"color": f"C{plain.index(each.corrected or name)}", "marker": "o", "markersize": 4,
               "linestyle": "--" if each.corrected else "-"}
        for name, each in METHODS.items()
    }  # fmt: skip


def line_of_calls(runs: list[Mapping[str, Any]]) -> Line:
    """Network calls, mean distance and its standard error at every mark."""
    marks = list(zip(*(run["curve"] for run in runs if run["finite"]), strict=True))
    values = [[distance for _, distance in mark] for mark in marks]
    calls = [mean(calls for calls, _ in mark) for mark in marks]
    return calls, [mean(each) for each in values], [standard_error(each) or 0.0 for each in values]


def draw_calls(record: dict[str, Any], path: Path, steps: int = 4) -> None:
    """The distance over network calls, a panel for each teacher and guidance."""
    plan, panels = Plan(**record["plan"]), {}
    for teacher, guidance, _ in sections(record["summary"]):
        found = {method: finals(plan, record["runs"], teacher, guidance, steps, method)[1] for method in METHODS}
        runs = {method: [run for run in by_seed.values() if run["finite"]] for method, by_seed in found.items()}
        lines = {method: line_of_calls(each) for method, each in runs.items() if each}
        if lines:
            panels[f"{teacher}, guidance {guidance}, {named(str(steps))}"] = lines
    if panels:
        labels = ("network calls", "Fréchet distance to the teacher")
        ticks = [round(share * plan.calls) for share in MARKS]
        draw_lines(panels, labels, path, styles(), in_row=3, xscale="log", xticks=ticks, xticklabels=ticks)


def draw_steps(record: dict[str, Any], path: Path) -> None:
    """The distance over the student's steps, a panel for each teacher and guidance."""
    panels: dict[str, dict[str, Line]] = {}
    for teacher, guidance, by_steps in sections(record["summary"]):
        lines: dict[str, Line] = {}
        for method in METHODS:
            entries = {int(steps): cell[method] for steps, cell in by_steps.items() if "mean" in cell.get(method, {})}
            if entries:
                values = [(each["mean"][METRIC], each["standard_error"][METRIC] or 0.0) for each in entries.values()]
                lines[method] = (list(entries), *map(list, zip(*values, strict=True)))
        panels[f"{teacher}, guidance {guidance}"] = lines
    if panels:
        labels = ("steps of the student", "Fréchet distance to the teacher")
        draw_lines(panels, labels, path, styles(), in_row=3, xscale="log", xticks=STEPS, xticklabels=STEPS)


def strip_name(teacher: str, guidance: str) -> str:
    return f"benchmark_{teacher}_{guidance}.png"


def pictured(teacher: str, guidance: str, folder: Path) -> dict[str, list[Path]]:
    """The methods that have pictures at all pictured numbers of steps, with their files."""
    files = {
        method: [folder / f"{teacher}-{guidance}-{steps}-{method}.png" for steps in PICTURED_STEPS]
        for method in METHODS
    }
    return {method: each for method, each in files.items() if all(file.exists() for file in each)}


def draw_strips(files: Mapping[str, list[Path]], path: Path) -> None:
    """A row a method: its students' pictures at each pictured number of steps, side by side."""
    rows = {method: torch.stack([read_image(file) for file in each]) / 255 for method, each in files.items()}
    if rows:
        labelled_rows(rows).save(path, optimize=True)


def main() -> None:
    record = json.loads(RESULT.read_text())
    write_between(PAGE, tables(record))
    draw_calls(record, IMAGES / CALLS_FIGURE)
    draw_steps(record, IMAGES / STEPS_FIGURE)
    for teacher, guidance, _ in sections(record["summary"]):
        draw_strips(pictured(teacher, guidance, PICTURES), IMAGES / strip_name(teacher, guidance))


if __name__ == "__main__":
    main()
