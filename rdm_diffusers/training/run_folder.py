"""A run's folder: one run at a time, and the checkpoint that it resumes from."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import Accelerator

from ..config import RunConfig
from ..folders import LOCK, locked
from ..hub import finish_exports
from .checkpoint_files import find_checkpoint, set_newer_aside, tidy, updates_of
from .checkpoints import TrainState, load_checkpoint

RUN_LOCK = f".run{LOCK}"


@contextmanager
def alone_in(folder: Path, accelerator: Accelerator, changes: bool = True) -> Iterator[None]:
    """Inside, no other run writes into the folder, and what a killed one left half done is in order.

    One process holds the lock, and the others wait for it. A dry run changes nothing and needs no lock. Readers of the
    folder, such as rdm-export and rdm-push, need none either.

    Raises:
        ValueError: if another run uses the folder.
    """
    with ExitStack() as stack:
        if accelerator.is_main_process and changes:
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


def checkpoint_to_resume(folder: Path, config: RunConfig) -> Path | None:
    """The checkpoint that the run goes on from; None if it begins.

    Raises:
        ValueError: if there is no such checkpoint, or if it has more updates than the run will have.
    """
    if not config.output.resume_from_checkpoint:
        return None
    checkpoint = find_checkpoint(folder, config.output.resume_from_checkpoint)
    done, wanted = updates_of(checkpoint), config.optimisation.max_train_steps
    if done > wanted:
        raise ValueError(
            f"--max_train_steps {wanted} is less than the {done} updates of {checkpoint}; raise it, "
            "resume from an earlier checkpoint, or make a student of an earlier one with rdm-export."
        )
    return checkpoint


def go_on_from(checkpoint: Path, folder: Path, state: TrainState, accelerator: Accelerator) -> None:
    """Loads a checkpoint, and sets newer ones in the folder aside, which belong to a course that this run leaves."""
    load_checkpoint(checkpoint, state)
    place = set_newer_aside(folder, checkpoint) if accelerator.is_main_process else None
    if place is not None:
        print(f"The run goes back to {checkpoint.name}; the newer checkpoints are now in {place}.")
