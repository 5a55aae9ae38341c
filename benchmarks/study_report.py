"""The studies' tables and plots: `python benchmarks/study_report.py`.

Writes each comparison of `results/method_study.json`, and `results/guidance_study.json` and `target_study.json` as the
comparisons `guidance` and `target`, as tables into `docs/method.md`, between the comments `study: <comparison>` and
`end`. Draws `docs/images/method_main.png` (distance over calls) and `method_pareto.png` (reward against distance).
"""

from __future__ import annotations

import json
from statistics import mean

from pages import draw_lines, markdown_table, plus_minus, write_between
from runs import RESULTS, ROOT, standard_error

GRIDS = ("tuning", "tuning, flow", "tuning, target", "tuning, target, flow", "tuning, target, v", "lambda")
TEACHERS = ("tiny", "tiny-flow", "tiny-v")
METHOD = ROOT / "docs" / "method.md"
IMAGES = ROOT / "docs" / "images"


def table(comparison: dict, teacher: str) -> str:
    """One comparison on one teacher, a row per variant."""
    entries = comparison.get(teacher, {})
    reused = any("reuse_rollouts" in entry["flags"] for entry in entries.values())
    columns = [teacher, "fd_to_teacher", "change, 100 ln", "prompt accuracy", "tiny_prompt", "tiny_bold"]
    columns += ["rollouts"] * reused + ["seeds"]
    rows = []
    for name, entry in entries.items():
        means, errors = entry["mean"], entry["standard_error"]
        change = entry.get("against_first")
        changed = f"{change['change_100_ln']:+.0f}{plus_minus(change['standard_error'])}" if change else ""
        ruined = f" ({len(entry['not_finite'])} not finite)" if entry["not_finite"] else ""
        cells = [name, f"{means['fd_to_teacher']:.2f}{plus_minus(errors['fd_to_teacher'], 2)}{ruined}", changed]
        cells += [f"{means[metric]:.3f}" for metric in ("prompt_accuracy", "tiny_prompt", "tiny_bold")]
        cells += [f"{next(iter(entry['curves'].values()))[-1]['rollouts']:,}"] * reused + [str(len(entry["seeds"]))]
        rows.append(cells)
    return markdown_table(columns, rows)


def grid(comparison: dict, teacher: str) -> str:
    """Variants named `row, n fake updates` as a grid of mean distances; the number of seeds in brackets."""
    entries = comparison.get(teacher, {})
    rows = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name in entries))
    columns = ["1 fake updates", "2 fake updates", "5 fake updates"]
    lines = []
    for row in rows:
        cells = [entries.get(f"{row}, {column}") for column in columns]
        shown = [f"{e['mean']['fd_to_teacher']:.2f} ({len(e['seeds'])})" if e else "" for e in cells]
        lines.append([row, *shown])
    return markdown_table([f"{teacher}, fd_to_teacher", *columns], lines)


def guidance_table(entries: dict, teacher: str) -> str:
    """A row a student: its distances to the teacher at each guidance scale, the least of each column in bold."""
    scales = [key for key in next(iter(entries.values()))["mean"] if key.startswith("fd_at_")]
    columns = [teacher, *(f"teacher at {key.removeprefix('fd_at_')}" for key in scales), "prompt accuracy", "seeds"]
    rows = []
    least = {key: min(entry["mean"][key] for entry in entries.values()) for key in scales}
    for name, entry in entries.items():
        means, errors = entry["mean"], entry["standard_error"]
        cells = [f"{means[key]:.1f}{plus_minus(errors[key], 1)}" for key in scales]
        cells = [f"**{cell}**" if means[key] == least[key] else cell for key, cell in zip(scales, cells, strict=True)]
        cells += [f"{means['prompt_accuracy']:.3f}", str(len(entry["seeds"]))]
        rows.append([name, *cells])
    return markdown_table(columns, rows)


def target_table(record: dict) -> str:
    """A row a target, with what it draws beside the images that it learnt, and its loss beside the teacher's own."""
    columns = ["a target of", "its images: fd_to_teacher", "fd_to_data", "the teacher's images: fd_to_teacher"]
    columns += ["loss on held-out images", "the teacher's own, unguided"]
    rows = []
    for name, entry in record["targets"].items():
        drawn, learnt = entry["measured"], record["images"][str(entry["flags"]["target_inference_steps"])]
        cells = [name, f"{drawn['fd_to_teacher']:.2f}", f"{drawn['fd_to_data']:.1f}", f"{learnt['fd_to_teacher']:.2f}"]
        cells += [f"{entry['target'][str(entry['update'])]:.4f}", f"{entry['teacher']['unguided']:.4f}"]
        rows.append(cells)
    return markdown_table(columns, rows)


def curve(entry: dict) -> tuple[list[float], list[float], list[float]]:
    """Network calls, mean distance and its standard error at every mark."""
    runs = [run for run in entry["curves"].values() if run]
    marks = list(zip(*runs, strict=False))
    values = [[point["fd_to_teacher"] for point in mark] for mark in marks]
    errors = [standard_error(v) or 0.0 for v in values]
    return [mean(p["network_calls"] for p in mark) for mark in marks], [mean(v) for v in values], errors


def draw_main(record: dict) -> None:
    """The distance to the teacher over network calls."""
    panels = {
        teacher: {name: curve(entry) for name, entry in record["main"][teacher].items()}
        for teacher in TEACHERS
        if teacher in record["main"]
    }
    draw_lines(panels, ("network calls", "Fréchet distance to the teacher"), IMAGES / "method_main.png")


def draw_pareto(record: dict) -> None:
    """The reward against the distance, one line a way of combining."""
    import matplotlib.pyplot as plt

    teachers = [teacher for teacher in TEACHERS if teacher in record]
    figure, panels = plt.subplots(1, len(teachers), figsize=(5 * len(teachers), 3.6), squeeze=False)
    for axes, teacher in zip(panels[0], teachers, strict=True):
        for way in sorted({name.split()[0] for name in record[teacher]}):
            entries = [(name, entry) for name, entry in record[teacher].items() if name.split()[0] == way]
            points = [(entry["mean"]["tiny_bold"], entry["mean"]["fd_to_teacher"]) for _, entry in entries]
            axes.plot(*zip(*points, strict=True), marker="o", label=way)
            for (name, _), point in zip(entries, points, strict=True):
                axes.annotate(name.split()[1], point, fontsize=8)
        axes.set(xlabel="reward tiny_bold", ylabel="Fréchet distance to the teacher", title=teacher, yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.tight_layout()
    figure.savefig(IMAGES / "method_pareto.png", dpi=130)


def tables(name: str, comparison: dict) -> str:
    """A comparison's tables, one a teacher."""
    draw = grid if name in GRIDS else table
    return "\n\n".join(draw(comparison, teacher) for teacher in TEACHERS if teacher in comparison)


def main() -> None:
    record = json.loads((RESULTS / "method_study.json").read_text())["comparisons"]
    written = {name: tables(name, comparison) for name, comparison in record.items()}
    guidance = RESULTS / "guidance_study.json"
    if guidance.exists():
        studied = json.loads(guidance.read_text())["teachers"]
        written["guidance"] = "\n\n".join(guidance_table(entries, teacher) for teacher, entries in studied.items())
    targets = RESULTS / "target_study.json"
    if targets.exists():
        written["target"] = target_table(json.loads(targets.read_text()))
    write_between(METHOD, written)
    draw_main(record)
    draw_pareto(record["pareto"])


if __name__ == "__main__":
    main()
