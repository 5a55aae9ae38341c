"""Signals during training: all processes finish and save the current update."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from ..program import status_of

ONE_EVENT = 1.0  # seconds within which the launcher may repeat a batch system's signal


@dataclass
class Interruption:
    """The first signal's number, 0 before it came, and when it came, in seconds of the monotonic clock."""

    number: int = 0
    since: float = 0.0


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Makes Ctrl-C, SIGTERM and SIGHUP wait for the current update; a second signal stops at once."""
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

    caught = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
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
