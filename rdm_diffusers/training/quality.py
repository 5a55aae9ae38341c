"""After each grid of images: metrics, the best checkpoint, early stopping; and the run's report, however it ends."""

from __future__ import annotations

import signal
import warnings
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ..evaluation.records import number
from ..program import explain, one_line
from ..report import Report, Status
from ..report.rows import METRICS_FILE, VALIDATION, Row, append_row, write_rows
from .best import keep_best, name_of_metric, reason_to_stop
from .loop import train
from .validation_metrics import measure_student

if TYPE_CHECKING:
    from .trainer import Trainer


def train_and_report(trainer: Trainer) -> int:
    """`loop.train`, with `report.html`, however it ends; the file of metrics begins with the checkpoint's rows."""
    if trainer.accelerator.is_main_process:
        write_rows(trainer.folder / VALIDATION / METRICS_FILE, trainer.state.metrics)
        chosen = name_of_metric(trainer)
        best = (chosen, trainer.config.validation.more_is_better) if chosen else None
        trainer.report = Report(trainer.folder, trainer.arguments, trainer.texts.shown, best)
    _stop_early(trainer)
    try:
        caught = train(trainer)
    except BaseException as error:
        write_report(trainer, "failed", explain(error) or f"{type(error).__name__}: {one_line(error)}")
        raise
    done = trainer.state.update == trainer.config.optimisation.max_train_steps
    write_report(trainer, "trained" if done else "stopped", "" if done else _why(trainer, caught))
    return caught


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
    write_report(trainer, "running")


def write_report(trainer: Trainer, state: str, sentence: str = "") -> None:
    """Writes `report.html` on the main process; an error becomes a warning."""
    if trainer.report is None:
        return
    try:
        trainer.report.write(Status(state, trainer.state.update, sentence))
    except Exception as error:  # of the disk, or of a file that was changed meanwhile
        warnings.warn(f"report.html could not be written ({one_line(error)}); the run goes on.", stacklevel=2)


def as_text(row: Row) -> str:
    """A row of metrics for the log."""
    values = [f"{name} {number(value)}" for name, value in row.items() if name != "update"]
    return f"update {row['update']}: {', '.join(values)}"


def _why(trainer: Trainer, caught: int) -> str:
    """Why a training ended before its last update."""
    if caught:
        return f"{signal.Signals(caught).name} stopped the run; continue it with --resume_from_checkpoint latest."
    return reason_to_stop(trainer) or "A callback stopped the training."


def _stop_early(trainer: Trainer) -> None:
    reason = reason_to_stop(trainer)
    if reason is not None:
        trainer.stop()
        if trainer.accelerator.is_main_process:
            tqdm.write(reason)
