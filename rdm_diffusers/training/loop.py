"""The training loop: one rollout, the student's update, the fake score's updates; read it top to bottom."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import set_seed
from torch import Tensor

from ..distillation import LCM
from ..networks import FAKE_SCORE, STUDENT
from .batches import collect, reuse, weigh_samples
from .checkpoint_files import PREFIX
from .checkpoints import TrainState, is_saved, save_checkpoint
from .consistency import collect_noised
from .finite import FiniteChecks
from .interrupts import interruptible, largest_over_processes
from .optimizers import update_average
from .run import Distillation
from .tracking import Progress
from .updates import fake_score_update, student_update

if TYPE_CHECKING:
    from .trainer import Trainer

STOP = 128  # above every signal's number


def train(trainer: Trainer) -> int:
    """Trains from the state's update to `--max_train_steps`.

    Args:
        trainer: after `Trainer.load`; its state is updated in place.

    Returns:
        0 at the end, or the number of the signal that ended it early; a checkpoint has been written then.
    """
    run, state, method, output = trainer.distillation, trainer.state, trainer.config.method, trainer.config.output
    progress = Progress(trainer)
    with interruptible() as interrupted:

        def end() -> int:
            return largest_over_processes(interrupted.number or STOP * trainer.stopping, trainer.accelerator)

        while state.update < trainer.config.optimisation.max_train_steps and not end():
            began = time.monotonic()
            seed_all(run, state.update)
            number = state.update // method.reuse_rollouts
            run = trainer.distillation.of_rollout(number)
            batch = collect_noised(run, number) if isinstance(run.objective, LCM) else collect(run, number)
            for visit in range(method.reuse_rollouts):
                batch = reuse(run, batch) if visit else batch
                batch, health = weigh_samples(run, batch, state.statistics, state.update)
                health |= student_update(run, batch, state.statistics)
                health["student_grad_norm"] = step(state, STUDENT, run.checks)
                for repeat in range(method.fake_updates_per_step):
                    health |= fake_score_update(run, batch, visit * method.fake_updates_per_step + repeat)
                    health["fake_grad_norm"] = step(state, FAKE_SCORE, run.checks)
                state.update += 1

                progress.log(health)
                if state.update % output.validation_steps == 0:
                    trainer.validate()
                if state.update % output.checkpointing_steps == 0:
                    checkpoint(trainer)
                    interrupted.check_patience(time.monotonic() - began, trainer.accelerator)
        progress.bar.close()
        number = end()
        if number:
            path, why = checkpoint(trainer), "Stopped" if number == STOP else "Interrupted"
            trainer.accelerator.print(
                f"\n{why} after {state.update} updates; saved {path}. Continue with --resume_from_checkpoint latest."
            )
    return 0 if number == STOP else number


def seed_all(run: Distillation, update: int) -> None:
    """Seeds what draws without a generator of ours, as a user's reward may; another number on every process."""
    set_seed(run.draws.number("update", update * run.num_processes + run.process_index) % 2**32)


def step(state: TrainState, role: str, checks: FiniteChecks) -> Tensor:
    """Moves one role, and the student's average with it, if all is finite; the gradient's norm before clipping.

    An overflow in float16 moves neither. The update counts all the same, for the learning rate and the random numbers.
    """
    role_optimizer = state.optimizers[role]
    role_optimizer.set_update(state.update)
    norm = role_optimizer.step(checks)
    if role == STUDENT and state.ema is not None and role_optimizer.has_moved:
        update_average(state.ema, role_optimizer.parameters)
    return norm


def checkpoint(trainer: Trainer) -> Path:
    """Writes a checkpoint into the run's folder, if it is not there; every process takes part until it is whole."""
    folder, state, accelerator = trainer.folder, trainer.state, trainer.accelerator
    team, leads = accelerator if trainer.distillation.is_sharded else None, accelerator.is_main_process
    path = folder / f"{PREFIX}{state.update}"
    if largest_over_processes(leads and is_saved(folder, state, trainer.arguments), accelerator):
        return path
    if team or leads:
        save_checkpoint(folder, state, trainer.arguments, trainer.config.output.checkpoints_total_limit, team)
    accelerator.wait_for_everyone()
    trainer.notify("on_checkpoint", path)
    return path
