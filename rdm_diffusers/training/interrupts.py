"""Signals during training: all processes finish and save the current update."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
import torch
from accelerate import Accelerator

from ..program import status_of

ONE_EVENT = 1.0  # seconds within which the launcher may repeat a batch system's signal
PATIENCE, DEFAULT_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30  # seconds, as torchrun reads it


@dataclass
class Interruption:
    """The first signal's number, 0 before it came, and when it came, in seconds of the monotonic clock."""

    number: int = 0
    since: float = 0.0
    has_warned: bool = False

    def check_patience(self, seconds: float, accelerator: Accelerator) -> None:
        """Warns once if the launcher would kill a run that is stopped before its checkpoint is whole.

        Args:
            seconds: from the start of an update to the end of the checkpoint after it.
            accelerator: its main process warns.
        """
        patience = launchers_patience()
        if patience is None or seconds <= patience or self.has_warned or not accelerator.is_main_process:
            return
        self.has_warned = True
        warnings.warn(
            f"An update with its checkpoint takes {seconds:.0f} s, and the launcher kills a run {patience} s after it "
            "is told to stop, so that its last checkpoint may be lost. Before the next launch, run: "
            f"export {PATIENCE}={int(2 * seconds) + 1}",
            stacklevel=2,
        )


def launchers_patience() -> int | None:
    """Seconds between SIGTERM and SIGKILL under torch's launcher, which accelerate's uses, too; None under others."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    flag = None
    with suppress(psutil.Error):
        words = psutil.Process(os.getppid()).cmdline()
        flag = re.search(r"--shutdown[-_]timeout[= ](\d+)", " ".join(words))
    return int(flag[1] if flag else os.environ.get(PATIENCE, DEFAULT_PATIENCE))


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Makes Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 wait for the current update; a second signal stops at once."""
    it = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield it
        return

    def handle(number: int, frame: object) -> None:
        if not it.number:
            it.number, it.since = number, time.monotonic()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif time.monotonic() - it.since > ONE_EVENT:
            sys.exit(status_of(number))

    caught = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]  # the last as batch systems may send it
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as nohup asks for
        caught.remove(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in caught}
    try:
        yield it
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def largest_over_processes(number: int, accelerator: Accelerator) -> int:
    """The largest of all processes' numbers, so that all of them leave the loop together, for one reason."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
