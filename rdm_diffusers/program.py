"""A console program from start to end: its streams, its signals, what a user sees of an error, and its exit status.

An error that could be foreseen is one sentence. Any other error is a bug and shows its traceback.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

VERBOSE = "RDM_VERBOSE"  # an environment variable: if set, other packages say all they want
TRACEBACK = "RDM_TRACEBACK"  # an environment variable: if set, every error shows its traceback
MEMORY_ADVICE = "give it less to do at once"
# Errors without a public class are recognised by their message, those of libraries that may be missing by class name.
NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
LOST_PROCESS = ("gloo", "Connection closed by peer", "Connection reset by peer")
CONNECTION = ("TransportError", "RequestException")  # of the Hub's HTTP library: requests, httpx or httpx2
BAD_DATA = ("DatasetsError", "ArrowException", "YAMLError")


class RunError(RuntimeError):
    """Ends a run on purpose. Its message says why, and what to do."""


def explain(error: BaseException, memory_advice: str = MEMORY_ADVICE) -> str | None:
    """What is wrong and what to do, in one line; None for an error that nobody foresaw.

    Args:
        error: any.
        memory_advice: what to try if memory runs out, for example flags of the program.
    """
    said = one_line(error)
    if _is_out_of_memory(error):
        return f"There is not enough memory ({said}); {memory_advice}."
    if isinstance(error, SafetensorError):
        return f"A file of weights is cut off, damaged or no safetensors ({said}); download or write it again."
    if type(error) is json.JSONDecodeError:
        return f"A file that should hold JSON is damaged ({said}); download or write it again."
    if isinstance(error, UnicodeDecodeError):
        return f"A file that should hold text is not in UTF-8 ({said}); convert it."
    if _has_class(error, CONNECTION):
        return f"The connection to the Hub failed ({said}); check the network and try again."
    if _has_class(error, BAD_DATA):
        return f"A data file cannot be read ({one_line(list(causes(error))[-1])}); check it, or download it again."
    if type(error) is Exception:  # tokenizers raises these
        return f"A file of a model is damaged, or of an unknown kind ({said}); download it again."
    if _is_lost_process(error):
        return f"Another process of this run has ended, and says why in a message of its own ({said})."
    return said if isinstance(error, ValueError | ImportError | OSError | RunError) else None


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, or its class name if the message is empty."""
    return " ".join(line for line in map(str.strip, str(error).splitlines()) if line) or type(error).__name__


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the errors that it was raised from, the first one last."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)


def _has_class(error: BaseException, names: tuple[str, ...]) -> bool:
    return any(base.__name__ in names for base in type(error).__mro__)


def _is_lost_process(error: BaseException) -> bool:
    if torch.distributed.is_available() and isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PROCESS)


def run_program(main: Callable[[], object], memory_advice: str = MEMORY_ADVICE) -> None:
    """Runs a program; an error that could be foreseen becomes one line and the exit status 1.

    A program that a signal ends cleans up first, and has the status that shells expect: 128 plus the signal's number.

    Args:
        main: the program, without arguments.
        memory_advice: as in `explain`.
    """
    with _lasting_streams(), _ending_on_signals(), _plain_warnings():
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
    """The exit status of a program that a signal ended."""
    return 128 + number


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end the program as `sys.exit` does, so that it cleans up.

    One process of several is left alone: it would not run a Python handler while it waits for the others. A signal
    that is ignored, as SIGHUP is under nohup, stays ignored.
    """
    alone = threading.current_thread() is threading.main_thread() and os.environ.get("WORLD_SIZE", "1") == "1"
    signals = (signal.SIGTERM, signal.SIGHUP) if alone else ()
    handled = [number for number in signals if signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, lambda number, frame: sys.exit(status_of(number)))
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Shows a warning of our own as one sentence, and of other packages as ever; all as ever with `RDM_VERBOSE`."""
    before, script = warnings.showwarning, getattr(sys.modules["__main__"], "__file__", None)
    ours = (str(Path(__file__).parent), *([script] if script else []))

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **options: Any) -> None:
        if issubclass(category, UserWarning) and filename.startswith(ours):
            tqdm.write(f"Warning: {' '.join(str(message).split())}", file=sys.stderr)  # not into a bar
        else:
            before(message, category, filename, *rest, **options)

    warnings.showwarning = before if os.environ.get(VERBOSE) else show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextmanager
def _lasting_streams() -> Iterator[None]:
    """Lets the program go on when its output cannot be written: a closed pipe or terminal, a full disk."""
    before = sys.stdout, sys.stderr
    lasting = [stream and _LastingStream(stream) for stream in before]
    sys.stdout, sys.stderr = cast("tuple[TextIO, TextIO]", tuple(lasting))
    try:
        yield
    finally:
        for stream in filter(None, lasting):
            stream.flush()
        sys.stdout, sys.stderr = before


class _LastingStream:
    """A text stream that drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._discard_output()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._discard_output()

    def _discard_output(self) -> None:
        """Points the stream at /dev/null, so that Python can flush its buffer when it exits."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
