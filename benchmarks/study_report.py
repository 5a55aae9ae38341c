"""The method study's tables and plots: `python benchmarks/study_report.py`.

Writes each comparison of `results/method_study.json` as tables into `docs/evidence.md`, between the comments
`study: <comparison>` and `end`, without variants of fewer than `MIN_SEEDS` seeds. Those of `PLOTS` get a picture in
`docs/images`, too: the distance over what was spent.
"""

from __future__ import annotations

import json
from statistics import mean

from pages import markdown_table, plus_minus, write_between
from runs import RESULTS, ROOT, standard_error

MIN_SEEDS = 5
TEACHERS = ("tiny", "tiny-flow", "tiny-v")
EVIDENCE = ROOT / "docs" / "evidence.md"
IMAGES = ROOT / "docs" / "images"
SPENT = {"rollouts": "rollouts", "network_calls": "network calls", "processor_seconds": "processor seconds"}
PLOTS = {"main": ("network_calls",), "reuse": tuple(SPENT), "reuse, quick": tuple(SPENT)}


def supported(comparison: dict, teacher: str) -> dict[str, dict]:
    """The variants of a comparison that have enough seeds on one teacher."""
    return {name: e for name, e in comparison.get(teacher, {}).items() if len(e["seeds"]) >= MIN_SEEDS}


def table(comparison: dict, teacher: str) -> str:
    """One comparison on one teacher, a row per variant; empty where none has enough seeds."""
    entries = supported(comparison, teacher)
    if not entries:
        return ""
    spent = any("reuse_rollouts" in entry["flags"] for entry in entries.values())
    columns = [teacher, "fd_to_teacher", "change, 100 ln", "prompt accuracy"]
    columns += [*SPENT.values()] * spent + ["seeds"]
    rows = [[name, *cells(entry), *(costs(entry) if spent else ()), str(len(entry["seeds"]))]
            for name, entry in entries.items()]  # fmt: skip
    return markdown_table(columns, rows)


def cells(entry: dict) -> list[str]:
    """A variant's distance, its change against the first variant, and its accuracy."""
    means, errors, change = entry["mean"], entry["standard_error"], entry.get("against_first")
    changed = f"{change['change_100_ln']:+.0f}{plus_minus(change['standard_error'])}" if change else ""
    ruined = f" ({len(entry['not_finite'])} not finite)" if entry["not_finite"] else ""
    distance = f"{means['fd_to_teacher']:.2f}{plus_minus(errors['fd_to_teacher'], 2)}{ruined}"
    return [distance, changed, f"{means['prompt_accuracy']:.3f}"]


def costs(entry: dict) -> list[str]:
    """A variant's mean rollouts, network calls and processor seconds at its end."""
    ends = [run[-1] for run in entry["curves"].values() if run]
    return [f"{mean(end[name] for end in ends):,.0f}" for name in SPENT]


def curve(entry: dict, spent: str) -> tuple[list[float], list[float], list[float]]:
    """What was spent, mean distance and its standard error at every mark."""
    runs = [run for run in entry["curves"].values() if run]
    marks = list(zip(*runs, strict=False))
    values = [[point["fd_to_teacher"] for point in mark] for mark in marks]
    errors = [standard_error(v) or 0.0 for v in values]
    return [mean(point[spent] for point in mark) for mark in marks], [mean(v) for v in values], errors


def draw(name: str, comparison: dict) -> None:
    """The distance to the teacher over what was spent: a row of panels for each kind, a column a teacher."""
    import matplotlib.pyplot as plt

    chosen = [(teacher, entries) for teacher in TEACHERS if (entries := supported(comparison, teacher))]
    size = (4.5 * len(chosen), 3.6 * len(PLOTS[name]))
    figure, panels = plt.subplots(len(PLOTS[name]), len(chosen), figsize=size, squeeze=False)
    for row, spent in zip(panels, PLOTS[name], strict=True):
        for axes, (teacher, entries) in zip(row, chosen, strict=True):
            for variant, entry in entries.items():
                x, distances, errors = curve(entry, spent)
                axes.errorbar(x, distances, yerr=errors, marker="o", capsize=2, label=variant)
            axes.set(xlabel=SPENT[spent], ylabel="Fréchet distance to the teacher", title=teacher, yscale="log")
            axes.grid(alpha=0.3, which="both")
            axes.legend()
    figure.tight_layout()
    figure.savefig(IMAGES / picture(name), dpi=130)


def picture(name: str) -> str:
    """The file name of a comparison's plot."""
    return f"method_{name.replace(', ', '_')}.png"


def tables(name: str, comparison: dict) -> str:
    """A comparison's tables, one a teacher, and its plot."""
    found = [each for teacher in TEACHERS if (each := table(comparison, teacher))]
    if found and name in PLOTS:
        spent = ", ".join(SPENT[each] for each in PLOTS[name])
        found.append(f"![Distance to the teacher over {spent}](images/{picture(name)})")
    return "\n\n".join(found)


def main() -> None:
    record = json.loads((RESULTS / "method_study.json").read_text())["comparisons"]
    for name, comparison in record.items():
        if name in PLOTS and tables(name, comparison):
            draw(name, comparison)
    write_between(EVIDENCE, {name: tables(name, comparison) for name, comparison in record.items()})


if __name__ == "__main__":
    main()
