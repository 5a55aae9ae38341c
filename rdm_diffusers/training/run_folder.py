"""A run's folder: one run at a time, and the checkpoint that it resumes from."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import Accelerator

from ..folders import LOCK, locked
from ..hub import finish_exports
from .checkpoint_files import find_checkpoint, set_newer_aside, tidy, updates_of
from .checkpoints import TrainState, load_checkpoint

RUN_LOCK = f".run{LOCK}"


@contextmanager
def alone_in(folder: Path, args: argparse.Namespace, accelerator: Accelerator) -> Iterator[None]:
    """Keeps other runs out of the folder, after completing or removing what a killed run left half done.

    One process holds the lock, and the others wait for it. A dry run changes nothing and needs no lock. Readers of the
    folder, such as rdm-export and rdm-push, need none either.

    Raises:
        ValueError: if another run uses the folder.
    """
    with ExitStack() as stack:
        if accelerator.is_main_process and not args.dry_run:
            stack.enter_context(_lock(folder))
            tidy(folder)
            finish_exports(folder)
        accelerator.wait_for_everyone()
        yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    refusal = (
        f"--output_dir {folder} is in use by another run ({{holder}}); wait until it ends, stop it, or choose another "
        "folder."
    )
    with locked(folder / RUN_LOCK, refusal=refusal) as held:
        if not held:
            warnings.warn(
                f"The file system of {folder} has no locks, so nobody would notice a second run in this folder; "
                "make sure that there is none.",
                stacklevel=2,
            )
        yield


def checkpoint_to_resume(folder: Path, args: argparse.Namespace) -> Path | None:
    """The checkpoint that the run resumes from; None for a new run.

    Raises:
        ValueError: if there is no such checkpoint, or if it has more updates than the run will have.
    """
    if not args.resume_from_checkpoint:
        return None
    checkpoint = find_checkpoint(folder, args.resume_from_checkpoint)
    done = updates_of(checkpoint)
    if done > args.max_train_steps:
        raise ValueError(
            f"--max_train_steps {args.max_train_steps} is less than the {done} updates of {checkpoint}; raise it, "
            "resume from an earlier checkpoint, or make a student of an earlier one with rdm-export."
        )
    return checkpoint


def go_on_from(checkpoint: Path, folder: Path, state: TrainState, accelerator: Accelerator) -> None:
    """Loads a checkpoint, and sets newer ones in the folder aside, which belong to a course that this run leaves."""
    load_checkpoint(checkpoint, state)
    place = set_newer_aside(folder, checkpoint) if accelerator.is_main_process else None
    if place is not None:
        print(f"The run goes back to {checkpoint.name}; the newer checkpoints are now in {place}.")
