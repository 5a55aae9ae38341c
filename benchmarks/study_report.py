"""The study's tables and plots: `python benchmarks/study_report.py`, from `results/method_study.json`.

Prints Markdown; draws `docs/images/method_main.png` (distance over calls) and `method_pareto.png` (reward against
distance).
"""

from __future__ import annotations

import json
import math
from statistics import mean, stdev

from runs import RESULTS, ROOT

GRIDS = ("tuning", "lambda")
IMAGES = ROOT / "docs" / "images"


def table(comparison: dict, teacher: str) -> str:
    """One comparison on one teacher, a row per variant."""
    lines = [
        f"| {teacher} | fd_to_teacher | change, 100 ln | prompt accuracy | tiny_bold | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in comparison.get(teacher, {}).items():
        means, errors = entry["mean"], entry["standard_error"]
        change = entry.get("against_first")
        changed = f"{change['change_100_ln']:+.0f}{plus_minus(change['standard_error'])}" if change else ""
        ruined = f" ({len(entry['not_finite'])} not finite)" if entry["not_finite"] else ""
        lines.append(
            f"| {name} | {means['fd_to_teacher']:.2f}{plus_minus(errors['fd_to_teacher'], 2)}{ruined} | {changed} "
            f"| {means['prompt_accuracy']:.3f} | {means['tiny_bold']:.3f} | {len(entry['seeds'])} |"
        )
    return "\n".join(lines)


def grid(comparison: dict, teacher: str) -> str:
    """Variants named `row, n fake updates` as a grid of mean distances; the number of seeds in brackets."""
    entries = comparison.get(teacher, {})
    rows = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name in entries))
    columns = ["1 fake updates", "2 fake updates", "5 fake updates"]
    lines = [f"| {teacher}, fd_to_teacher | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [entries.get(f"{row}, {column}") for column in columns]
        shown = [f"{e['mean']['fd_to_teacher']:.2f} ({len(e['seeds'])})" if e else "" for e in cells]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plus_minus(error: float | None, digits: int = 0) -> str:
    """A standard error, where there is one."""
    return "" if error is None else f" ± {error:.{digits}f}"


def curve(entry: dict) -> tuple[list[float], list[float], list[float]]:
    """Network calls, mean distance and its standard error at every mark."""
    runs = [run for run in entry["curves"].values() if run]
    marks = list(zip(*runs, strict=False))
    values = [[point["fd_to_teacher"] for point in mark] for mark in marks]
    errors = [stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0.0 for v in values]
    return [mean(p["network_calls"] for p in mark) for mark in marks], [mean(v) for v in values], errors


def draw_main(record: dict) -> None:
    """The distance to the teacher over network calls."""
    import matplotlib.pyplot as plt

    chosen = [("tiny", "main"), ("tiny-flow", "main, lr 2e-3")]
    chosen = [(teacher, name) for teacher, name in chosen if teacher in record[name]]
    figure, panels = plt.subplots(1, len(chosen), figsize=(5 * len(chosen), 3.6), squeeze=False)
    for axes, (teacher, comparison) in zip(panels[0], chosen, strict=True):
        for name, entry in record[comparison][teacher].items():
            axes.errorbar(*curve(entry)[:2], yerr=curve(entry)[2], marker="o", capsize=2, label=name)
        axes.set(xlabel="network calls", ylabel="Fréchet distance to the teacher", title=teacher, yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.tight_layout()
    figure.savefig(IMAGES / "method_main.png", dpi=130)


def draw_pareto(record: dict) -> None:
    """The reward against the distance, one line a way of combining."""
    import matplotlib.pyplot as plt

    teachers = [teacher for teacher in ("tiny", "tiny-flow") if teacher in record]
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


def main() -> None:
    record = json.loads((RESULTS / "method_study.json").read_text())
    for name, comparison in record["comparisons"].items():
        print(f"\n### {name}: {comparison['about']} ({comparison['network_calls']:,} network calls)\n")
        for teacher in ("tiny", "tiny-flow"):
            if teacher in comparison:
                print((grid if name in GRIDS else table)(comparison, teacher), end="\n\n")
    draw_main(record["comparisons"])
    draw_pareto(record["comparisons"]["pareto"])


if __name__ == "__main__":
    main()
