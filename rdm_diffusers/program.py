"""The life of a console program: its streams, signals and errors, and the status that it ends with."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from .errors import MEMORY_ADVICE, explain

TRACEBACK = "RDM_TRACEBACK"  # in the environment it shows where any error came from


def run_program(main: Callable[[], object], memory_advice: str = MEMORY_ADVICE) -> None:
    """Runs a program: an error that could be foreseen is one line and the status 1, a bug shows its traceback.

    A program that is ended by a signal has the status that shells expect, 128 and the signal's number, and has tidied
    up before.

    Args:
        main: the program, without arguments.
        memory_advice: as in `explain`.
    """
    with lasting_streams(), ending_on_signals():
        _run(main, memory_advice)


def _run(main: Callable[[], object], memory_advice: str) -> None:
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(status_of(signal.SIGINT))
    except Exception as error:
        sentence = explain(error, memory_advice)
        if sentence is None or os.environ.get(TRACEBACK):
            raise
        sys.exit(f"error: {sentence}")


def status_of(number: int) -> int:
    """The status of a program that a signal ended."""
    return 128 + number


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end the program as `sys.exit` does, so that nothing half made is left behind.

    Not one process of several: while it waits for the others it would not hear a handler of Python's.
    """
    alone = threading.current_thread() is threading.main_thread() and os.environ.get("WORLD_SIZE", "1") == "1"
    handled = [number for number in (signal.SIGTERM, signal.SIGHUP) if alone and _is_free(number)]
    for number in handled:
        signal.signal(number, lambda number, frame: sys.exit(status_of(number)))
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _is_free(number: int) -> bool:
    """Whether a signal has its usual effect; with nohup, SIGHUP is ignored and shall be."""
    return signal.getsignal(number) is signal.SIG_DFL


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Lets the program outlive who reads its output: a closed pipe, a terminal that is gone, a full disk."""
    before = sys.stdout, sys.stderr
    lasting = [stream and LastingStream(stream) for stream in before]
    sys.stdout, sys.stderr = cast("tuple[TextIO, TextIO]", tuple(lasting))
    try:
        yield
    finally:
        for stream in filter(None, lasting):
            stream.flush()
        sys.stdout, sys.stderr = before


class LastingStream:
    """A text stream that swallows what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes, or does as if."""
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Flushes, or does as if."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Sends all else into the void, what is in the stream's buffer too, which Python flushes when it ends."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
