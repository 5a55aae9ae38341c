"""Processes that are killed at a chosen file operation, and small things that are saved."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from rdm_diffusers.training.checkpoints import TrainState
from rdm_diffusers.training.optimizers import RoleOptimizer

OPERATIONS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}


def kills(work: Callable[[], object], folder: Path, prepare: Callable[[], object]) -> Iterator[int]:
    """Kills `work`, in a process of its own, before its first operation on a file in `folder`, its second, and so on.

    Yields:
        The operation's number, after `prepare` and the kill; ends with the first `work` that comes to its end.
    """
    for number in range(1, 1000):
        prepare()
        if not _killed(work, folder, number):
            return
        yield number
    raise AssertionError


def _killed(work: Callable[[], object], folder: Path, number: int) -> bool:
    child = os.fork()
    if child == 0:
        done = 0

        def count(event: str, args: tuple) -> None:
            nonlocal done
            if event in OPERATIONS and str(args[0]).startswith(str(folder)):
                done += 1
                if done == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(count)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def make_state(update: int = 0, value: float = 1.0) -> TrainState:
    """A role of one parameter, with its optimiser's memory, after so many updates."""
    parameters = [nn.Parameter(torch.full((3,), value))]
    optimizer = torch.optim.AdamW(parameters)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0)
    parameters[0].grad = torch.ones(3)
    optimizer.step()
    state = TrainState({"student": RoleOptimizer(parameters, optimizer, schedule, 1.0)}, None, update)
    state.monitor.state = {"updates": float(update), "smooth/fake_loss": 0.25}
    return state
