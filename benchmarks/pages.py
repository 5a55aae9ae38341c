"""How studies are written into pages: tables between comments, and curves with their errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Line = tuple[Sequence[float], Sequence[float], Sequence[float]]  # x, mean, standard error


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def plus_minus(error: float | None, digits: int = 0) -> str:
    """A standard error, where there is one."""
    return "" if error is None else f" ± {error:.{digits}f}"


def write_between(page: Path, written: Mapping[str, str]) -> None:
    """Replaces what is between the comments `study: <name>` and `end` of a page."""
    text = page.read_text()
    for name, each in written.items():
        marked = rf"(<!-- study: {re.escape(name)} -->\n).*?(<!-- end -->)"
        new = f"\n{each}\n\n" if each else ""
        text = re.sub(marked, lambda found, new=new: found[1] + new + found[2], text, flags=re.DOTALL)
    page.write_text(text)


def draw_lines(panels: Mapping[str, Mapping[str, Line]], labels: tuple[str, str], path: Path, **axes: object) -> None:
    """One panel beside the other, a line with errors for each entry; the y axis is logarithmic."""
    import matplotlib.pyplot as plt

    figure, places = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False)
    for place, (title, lines) in zip(places[0], panels.items(), strict=True):
        for name, (x, y, error) in lines.items():
            place.errorbar(x, y, yerr=error, marker="o", capsize=2, label=name)
        place.set(xlabel=labels[0], ylabel=labels[1], title=title, yscale="log", **axes)
        place.grid(alpha=0.3, which="both")
        place.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
