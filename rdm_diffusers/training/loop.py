"""The training loop: one rollout, the student's update, the fake score's updates; read it top to bottom."""

from __future__ import annotations

import argparse
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import one_line
from ..networks import FAKE_SCORE, STUDENT
from .checkpoint_files import PREFIX
from .checkpoints import TrainState, is_saved, save_checkpoint
from .interrupts import anywhere, interruptible
from .monitor import CollapseError
from .updates import Distillation, collect, fake_score_update, reuse, student_update, weigh_samples

SHOWN = ("reward_over_distance", "fake_loss", "log_ratio")


def train(
    run: Distillation,
    state: TrainState,
    args: argparse.Namespace,
    accelerator: Accelerator,
    validate: Callable[[int], None],
) -> int:
    """Trains from `state.update` to `args.max_train_steps`.

    Args:
        run: what stays the same.
        state: what changes; updated in place.
        args: the arguments.
        accelerator: logs, and says which process writes.
        validate: called with the number of updates done, every `--validation_steps`.

    Returns:
        0 at the end, or the number of the signal that ended it early; a checkpoint has been written then.
    """
    started, first = time.time(), state.update
    bar = tqdm(total=args.max_train_steps, initial=first, desc="distil", disable=not accelerator.is_main_process)
    with interruptible() as interrupted:
        while state.update < args.max_train_steps and not anywhere(interrupted.number, accelerator):
            seed_all(run, state.update)
            batch = collect(run, state.update // args.reuse_rollouts)
            for visit in range(args.reuse_rollouts):
                batch = reuse(run, batch) if visit else batch
                batch, health = weigh_samples(run, batch, state.statistics)
                health |= student_update(run, batch, state.statistics)
                health["student_grad_norm"] = step(state, STUDENT)
                for repeat in range(args.fake_updates_per_step):
                    health |= fake_score_update(run, batch, visit * args.fake_updates_per_step + repeat)
                    health["fake_grad_norm"] = step(state, FAKE_SCORE)
                state.update += 1

                bar.update()
                watch(health, state, args, accelerator, bar)
                if state.update % 10 == 0:
                    seconds = (time.time() - started) / (state.update - first)
                    report(health, run, state, accelerator, bar, seconds)
                if state.update % args.validation_steps == 0:
                    validate(state.update)
                if state.update % args.checkpointing_steps == 0:
                    checkpoint(state, args, accelerator)
        bar.close()
        signal_number = anywhere(interrupted.number, accelerator)
        if signal_number:
            path = checkpoint(state, args, accelerator)
            accelerator.print(
                f"\nInterrupted after {state.update} updates; saved {path}. Continue with --resume_from_checkpoint "
                "latest."
            )
    return signal_number


def seed_all(run: Distillation, update: int) -> None:
    """Seeds what draws without a generator of ours, as a user's reward may; another number on every process."""
    set_seed(run.draws.number("update", update * run.num_processes + run.process_index) % 2**32)


def watch(
    health: dict[str, Tensor], state: TrainState, args: argparse.Namespace, accelerator: Accelerator, bar: tqdm
) -> None:
    """Prints the alarms that begin to ring.

    Raises:
        CollapseError: if one does and the run is to stop then; earlier checkpoints stay as they are.
    """
    names = [name for name in health if "/step_" not in name and "/bin_" not in name]  # those every process has
    values = torch.stack([health[name].float() for name in names])
    known = values.isfinite()  # a process without a last step, or without a valid reward, has no say
    total, count = accelerator.reduce(torch.stack([values.where(known, 0), known.float()]), "sum")
    alarms = state.monitor.observe(dict(zip(names, (total / count).tolist(), strict=True)))
    for alarm in alarms:
        bar.write(f"update {state.update}: {alarm}")
    if alarms and args.stop_on_collapse:
        raise CollapseError(
            f"Stopped after {state.update} updates (--stop_on_collapse). {alarms[0]} The last checkpoint is older."
        )


def step(state: TrainState, role: str) -> Tensor:
    """Moves one role, and the student's average with it; the gradient's norm before clipping."""
    role_optimizer = state.optimizers[role]
    role_optimizer.set_update(state.update)
    norm = role_optimizer.step()
    if role == STUDENT and state.ema is not None:
        home = state.ema.shadow_params[0].device  # elsewhere than the student with --offload
        state.ema.to(role_optimizer.parameters[0].device)
        state.ema.step(role_optimizer.parameters)
        state.ema.to(home)
    return norm


def report(
    health: dict[str, Tensor],
    run: Distillation,
    state: TrainState,
    accelerator: Accelerator,
    bar: tqdm,
    seconds: float,
) -> None:
    """Sends the health numbers to the trackers, and the telling ones to the progress bar."""
    numbers = {name: value.item() for name, value in health.items()} | {"seconds_per_update": seconds}
    numbers["images_per_second"] = run.num_processes * len(run.groups(0)) * run.draws.group_size / seconds
    numbers["peak_memory_gib"] = peak_memory(accelerator.device) / 2**30
    numbers |= {f"network_calls/{name}": float(count) for name, count in run.networks.calls.items()}
    try:
        accelerator.log(numbers, step=state.update)
    except Exception as error:  # of whatever kind: a full disk, a server that is away
        warnings.warn(f"The trackers took no numbers ({one_line(error)}); the run goes on.", stacklevel=2)
    bar.set_postfix({name: f"{numbers[name]:.3g}" for name in SHOWN if name in numbers})


def checkpoint(state: TrainState, args: argparse.Namespace, accelerator: Accelerator) -> Path:
    """Writes a checkpoint into the output folder, if it is not there; every process takes part until it is whole."""
    folder, keep, writes = Path(args.output_dir), args.checkpoints_total_limit, accelerator.is_main_process
    if anywhere(writes and is_saved(folder, state, vars(args)), accelerator):
        return folder / f"{PREFIX}{state.update}"
    path = save_checkpoint(folder, state, vars(args), keep, writes)
    accelerator.wait_for_everyone()
    return path


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of the GPU's memory, or where there is none, of the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
