"""How studies are written into pages: tables between comments, and curves with their errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def draw_lines(
    panels: Mapping[str, Mapping[str, Line]],
    labels: tuple[str, str],
    path: Path,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
    in_row: int = 10,
    **axes: Any,
) -> None:
    """Panels with a line and its errors for each entry; the y axis is logarithmic.

    Args:
        panels: title -> entry -> line.
        labels: of both axes.
        path: of the picture.
        styles: of the entries; then one legend below serves all panels.
        in_row: panels side by side.
        axes: settings of every panel's axes.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator, ScalarFormatter

    columns = min(in_row, len(panels))
    rows = -(-len(panels) // columns)
    figure, places = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.6 * rows), squeeze=False)
    for place in places.flat[len(panels) :]:
        place.axis("off")
    for place, (title, lines) in zip(places.flat, panels.items(), strict=False):
        for name, (x, y, error) in lines.items():
            style = (styles or {}).get(name, {"marker": "o"})
            place.errorbar(x, y, yerr=error, capsize=2, label=name, **style)
        place.set(xlabel=labels[0], ylabel=labels[1], title=title, yscale="log", **axes)
        place.grid(alpha=0.3, which="both")
        if styles is None:
            place.legend()
            continue
        place.xaxis.set_minor_locator(NullLocator())
        place.yaxis.set_major_formatter(ScalarFormatter())
        place.yaxis.set_minor_formatter(ScalarFormatter())
    figure.tight_layout()
    if styles is not None:
        found = {
            name: handle
            for place in places.flat
            for handle, name in zip(*place.get_legend_handles_labels(), strict=True)
        }
        figure.legend(found.values(), found, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3 * columns)
    figure.savefig(path, dpi=130, bbox_inches="tight" if styles else None)
    plt.close(figure)
