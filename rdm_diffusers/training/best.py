"""What follows from the validation metrics: `checkpoint-best`, and early stopping, as in transformers' Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.validation import ValidationConfig
from ..evaluation.records import number
from ..report.rows import Row
from .checkpoint_files import BEST, RECORD, damage, read_record
from .checkpoints import load_checkpoint, save_checkpoint
from .interrupts import largest_over_processes

if TYPE_CHECKING:
    from .trainer import Trainer


def is_better(value: float | None, best: float | None, more: bool, threshold: float = 0.0) -> bool:
    """Whether a value, None if it is not finite, is better than the best before by more than a threshold.

    `more` says whether more is better. Any number is better than None.
    """
    if value is None or best is None:
        return value is not None
    return (value - best if more else best - value) > threshold


def values_without_gain(values: Sequence[float | None], more: bool, threshold: float) -> int:
    """How many of the last values in a row were not better than the best before, as transformers counts them."""
    best, count = None, 0
    for value in values:
        count = 0 if is_better(value, best, more, threshold) else count + 1
        best = value if is_better(value, best, more) else best
    return count


def check_best(folder: Path, validation: ValidationConfig) -> None:
    """ValueError if the folder has a `checkpoint-best` that is not by a metric, which the run would replace."""
    best = folder / BEST
    if validation.metric_for_best_model and (best / RECORD).exists() and not read_record(best).get("metrics"):
        raise ValueError(f"{best} was not chosen by a metric, and --metric_for_best_model would replace it; rename it.")


def name_of_metric(trainer: Trainer) -> str | None:
    """What the values of `--metric_for_best_model` are called; None without it."""
    chosen = trainer.config.validation.metric_for_best_model
    return trainer.metrics.names.get(chosen, chosen) if chosen and trainer.metrics else None


def best_row(folder: Path) -> Row | None:
    """The metrics of the folder's `checkpoint-best`; None if there is none, or if it is damaged."""
    best = folder / BEST
    rows = [] if damage(best) else read_record(best).get("metrics", [])
    return rows[-1] if rows else None


def keep_best(trainer: Trainer, row: Row | None) -> bool:
    """Writes `checkpoint-best` if the student is the best so far; every process must call.

    Args:
        trainer: its state holds the row already.
        row: of this update; None if it was not measured, and on all processes but the main one.
    """
    name, validation = name_of_metric(trainer), trainer.config.validation
    if validation.metric_for_best_model is None:
        return False
    accelerator, better = trainer.accelerator, False
    if row is not None and name is not None:
        before = best_row(trainer.folder)
        better = is_better(row[name], before.get(name) if before else None, validation.more_is_better)
    if not largest_over_processes(better, accelerator):
        return False
    team = accelerator if trainer.distillation.is_sharded else None
    if team or accelerator.is_main_process:
        save_checkpoint(trainer.folder, trainer.state, trainer.arguments, team=team, name=BEST)
    accelerator.wait_for_everyone()
    return True


def reason_to_stop(trainer: Trainer) -> str | None:
    """Why `--early_stopping_patience` ends the run now, in a sentence; None if it goes on."""
    validation, rows, name = trainer.config.validation, trainer.state.metrics, name_of_metric(trainer)
    patience = validation.early_stopping_patience
    if patience is None or name is None:
        return None
    values = [row.get(name) for row in rows]
    waited = values_without_gain(values, validation.more_is_better, validation.early_stopping_threshold)
    if waited < patience:
        return None
    return (
        f"Early stopping at update {trainer.state.update}: {name} has not become better by more than "
        f"{validation.early_stopping_threshold:g} in {waited} validations in a row (--early_stopping_patience "
        f"{patience}; raise it to go on)."
    )


def load_best(trainer: Trainer) -> None:
    """Puts the student and all of the state back to `checkpoint-best`, with `--load_best_model_at_end`.

    A run without one, because nothing could be measured, keeps its last student and says so.
    """
    validation, best = trainer.config.validation, trainer.folder / BEST
    if not validation.load_best_model_at_end:
        return
    problem = damage(best)
    if problem:
        if trainer.accelerator.is_main_process:
            warnings.warn(f"{best} cannot be read ({problem}); the last student is exported.", stacklevel=2)
        return
    load_checkpoint(best, trainer.state)
    name, rows = str(name_of_metric(trainer)), trainer.state.metrics
    value = number(rows[-1].get(name)) if rows else "-"
    trainer.accelerator.print(f"\nThe best student is that of update {trainer.state.update}: {name} {value}.")
