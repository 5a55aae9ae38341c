"""After each grid of validation images: metrics, the best checkpoint, early stopping."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ..evaluation.records import number
from .best import keep_best, reason_to_stop
from .rows import METRICS_FILE, Row, append_row, write_rows
from .validation_metrics import measure_student

if TYPE_CHECKING:
    from .trainer import Trainer

VALIDATION = "validation"  # the folder of the images and their metrics


@contextmanager
def watching(trainer: Trainer) -> Iterator[None]:
    """For the training: the file of metrics begins with the checkpoint's rows; what early stopping ended stays so."""
    if trainer.accelerator.is_main_process:
        write_rows(trainer.folder / VALIDATION / METRICS_FILE, trainer.state.metrics)
    _stop_early(trainer)
    yield


def follow_up(trainer: Trainer) -> None:
    """Measures the student, and does what follows from it. Every process must call."""
    row = measure_student(trainer)
    if row is not None:
        trainer.state.metrics.append(row)
        append_row(trainer.folder / VALIDATION / METRICS_FILE, row)
    is_best = keep_best(trainer, row)
    if row is not None:
        tqdm.write(as_text(row) + (", the best so far" if is_best else ""))
        _stop_early(trainer)


def as_text(row: Row) -> str:
    """A row of metrics for the log."""
    values = [f"{name} {number(value)}" for name, value in row.items() if name != "update"]
    return f"update {row['update']}: {', '.join(values)}"


def _stop_early(trainer: Trainer) -> None:
    reason = reason_to_stop(trainer)
    if reason is not None:
        trainer.stop()
        if trainer.accelerator.is_main_process:
            tqdm.write(reason)
