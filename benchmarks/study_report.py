"""The method study's tables and plots: `python benchmarks/study_report.py`.

Writes each comparison of `results/method_study.json` as tables into `docs/evidence.md`, between the comments
`study: <comparison>` and `end`, without variants of fewer than `MIN_SEEDS` seeds. Draws `docs/images/method_main.png`
(distance over calls).
"""

from __future__ import annotations

import json
import re
from statistics import mean

from runs import RESULTS, ROOT, standard_error

MIN_SEEDS = 5
TEACHERS = ("tiny", "tiny-flow", "tiny-v")
EVIDENCE = ROOT / "docs" / "evidence.md"
IMAGES = ROOT / "docs" / "images"


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
    columns += ["rollouts", "network calls", "processor seconds"] * spent + ["seeds"]
    rows = [[name, *cells(entry), *(costs(entry) if spent else ()), str(len(entry["seeds"]))]
            for name, entry in entries.items()]  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


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
    return [f"{mean(end[name] for end in ends):,.0f}" for name in ("rollouts", "network_calls", "processor_seconds")]


def plus_minus(error: float | None, digits: int = 0) -> str:
    """A standard error, where there is one."""
    return "" if error is None else f" ± {error:.{digits}f}"


def curve(entry: dict) -> tuple[list[float], list[float], list[float]]:
    """Network calls, mean distance and its standard error at every mark."""
    runs = [run for run in entry["curves"].values() if run]
    marks = list(zip(*runs, strict=False))
    values = [[point["fd_to_teacher"] for point in mark] for mark in marks]
    errors = [standard_error(v) or 0.0 for v in values]
    return [mean(p["network_calls"] for p in mark) for mark in marks], [mean(v) for v in values], errors


def draw_main(comparison: dict) -> None:
    """The distance to the teacher over network calls."""
    import matplotlib.pyplot as plt

    chosen = {teacher: entries for teacher in TEACHERS if (entries := supported(comparison, teacher))}
    figure, panels = plt.subplots(1, len(chosen), figsize=(4.5 * len(chosen), 3.6), squeeze=False)
    for axes, (teacher, entries) in zip(panels[0], chosen.items(), strict=True):
        for name, entry in entries.items():
            calls, distances, errors = curve(entry)
            axes.errorbar(calls, distances, yerr=errors, marker="o", capsize=2, label=name)
        axes.set(xlabel="network calls", ylabel="Fréchet distance to the teacher", title=teacher, yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.tight_layout()
    figure.savefig(IMAGES / "method_main.png", dpi=130)


def tables(comparison: dict) -> str:
    """A comparison's tables, one a teacher."""
    return "\n\n".join(filter(None, (table(comparison, teacher) for teacher in TEACHERS)))


def main() -> None:
    record = json.loads((RESULTS / "method_study.json").read_text())["comparisons"]
    text = EVIDENCE.read_text()
    for name, comparison in record.items():
        marked = rf"(<!-- study: {re.escape(name)} -->\n).*?(<!-- end -->)"
        new = f"\n{tables(comparison)}\n\n"
        text = re.sub(marked, lambda found, new=new: found[1] + new + found[2], text, flags=re.DOTALL)
    EVIDENCE.write_text(text)
    draw_main(record["main"])


if __name__ == "__main__":
    main()
