"""One trial in a process of its own: it is killed at a file operation, or reads damaged files.

Every trial is a fork of a process that has imported and prepared everything, so that it takes little time.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

PACKAGE = "rdm_diffusers"
PATIENCE = 120  # seconds after which a trial counts as hanging
# Good outcomes: after a kill, the old or the new files are whole; damage is reported in one of our sentences; damage
# changes nothing. Bad ones: good files are lost; numbers change without a message; a library's error instead of a
# sentence; useless files stay for ever.
INTACT, NOTICED, HARMLESS = GOOD = ("intact", "noticed", "harmless")
LOST, SILENT, TRACEBACK, DEBRIS = BAD = ("lost", "silent", "traceback", "debris")

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "fault.save"}


@dataclass(frozen=True)
class Verdict:
    """A trial's outcome, and the message or the finding behind it."""

    outcome: str
    found: str = ""


@dataclass(frozen=True)
class Moment:
    """When a process is killed: before its `number`-th file operation, or when that has written half of its file."""

    number: int
    half: bool = False


class Operations:
    """Counts a process's changes of files under `folder`, and kills it at one of them.

    Python's audit events are counted, and safetensors' writing, which has none. Audit hooks cannot be removed, so the
    process must end with its trial.
    """

    def __init__(self, folder: Path, moment: Moment | None = None):
        self.folder, self.moment, self.seen = str(folder), moment, []
        self._written: tuple[str, int] | None = None
        write = safetensors.torch.serialize_file

        def audited(tensors, filename, *args, **kwargs) -> None:
            sys.audit("fault.save", str(filename))
            write(tensors, filename, *args, **kwargs)

        safetensors.torch.serialize_file = audited
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple) -> None:
        if self._written is not None and event in (*CHANGES, "open"):
            (path, before), self._written = self._written, None
            os.truncate(path, (before + os.path.getsize(path)) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        path = self._changed(event, args)
        if path is None:
            return
        self.seen.append(f"{event} {os.path.basename(path)}")
        if self.moment is not None and len(self.seen) == self.moment.number:
            if not self.moment.half:
                os.kill(os.getpid(), signal.SIGKILL)
            appended = event == "open" and "a" in (args[1] or "")
            self._written = path, os.path.getsize(path) if appended and os.path.exists(path) else 0

    def _changed(self, event: str, args: tuple) -> str | None:
        """The file that an event changes, if it lies under the folder; what `rmtree` removes has a bare name."""
        writes = event == "open" and isinstance(args[0], str | bytes | os.PathLike) and _writes(args)
        if (event not in CHANGES and not writes) or isinstance(args[0], int):  # numbers are of locks' open files
            return None
        path = os.fsdecode(args[0])
        if os.path.isdir(path) and event in ("open", "fault.save"):
            return None  # an unnamed file, as tempfile makes it to try a folder
        return path if path.startswith(self.folder) or (event != "open" and not os.path.isabs(path)) else None


def _writes(event: tuple) -> bool:
    _, mode, flags = event
    return any(letter in mode for letter in "wax+") if mode else bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


def moments(folder: Path, act: Callable[[Path], Any]) -> list[tuple[Moment, str]]:
    """Every moment at which `act(folder)` may be killed, with the name of the operation."""

    def count() -> list[str]:
        operations = Operations(folder)
        act(folder)
        return list(operations.seen)

    found = []
    for number, operation in enumerate(in_child(count), 1):
        found.append((Moment(number), f"before {operation}"))
        if operation.split()[0] in ("open", "fault.save"):
            found.append((Moment(number, half=True), f"half of {operation.split()[-1]}"))
    return found


def kill(folder: Path, act: Callable[[Path], Any], moment: Moment) -> bool:
    """Whether `act(folder)`, in a process of its own, was killed at that moment; a half may come too late for that."""

    def killed() -> None:
        Operations(folder, moment)
        act(folder)

    with suppress(KilledError):
        in_child(killed)
        return False
    return True


class KilledError(Exception):
    """The child was killed by a signal."""


def in_child(call: Callable[[], Any]) -> Any:
    """What `call` returns, through JSON, in a fork of this process, whose output is discarded.

    Raises:
        KilledError: if a signal ended it.
        RuntimeError: if it raised.
    """
    with tempfile.TemporaryFile("w+") as answer:
        child = os.fork()
        if child == 0:
            _answer(call, answer)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            raise KilledError(f"by signal {os.WTERMSIG(status)}")
        answer.seek(0)
        reply = json.loads(answer.read())
    if "error" in reply:
        raise RuntimeError(reply["error"])
    return reply["value"]


def _answer(call: Callable[[], Any], answer) -> None:
    signal.alarm(PATIENCE)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the process ends with it
    try:
        reply = {"value": call()}
    except BaseException as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    os.pwrite(answer.fileno(), json.dumps(reply).encode(), 0)
    os._exit(0)


def judged(judge: Callable[[], Verdict]) -> Verdict:
    """A verdict from a process of its own, which may hang or end."""
    try:
        return Verdict(**in_child(lambda: asdict(judge())))
    except KilledError as error:
        return Verdict(LOST, f"the process that looked was ended {error}")
    except RuntimeError as error:
        return Verdict(LOST, f"carrying on failed with {error}")


def watched(read: Callable[[], Any], same: Callable[[Any], bool], names: list[str]) -> Verdict:
    """The outcome of reading damaged files.

    Args:
        read: reads as a user's command does.
        same: whether a result is that of undamaged files.
        names: a warning is about the damage if it contains one of these.
    """
    with _heard() as heard:
        try:
            result = read()
        except (Exception, SystemExit) as error:
            return _raised(error, names)
    said = [message for message in heard if any(name in message for name in names)]
    if said:
        return Verdict(NOTICED, said[0])
    return Verdict(HARMLESS) if same(result) else Verdict(SILENT, "other numbers, and nothing said so")


@contextmanager
def _heard() -> Iterator[list[str]]:
    """All warnings and log messages inside."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(), *map(logging.getLogger, (PACKAGE, "diffusers", "transformers"))]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield heard
        finally:
            heard += [str(warning.message) for warning in caught]
            for logger in loggers:
                logger.removeHandler(handler)


def _raised(error: BaseException, names: list[str]) -> Verdict:
    """The outcome of an error: a sentence is our own, or a library's that names the damaged file."""
    where = os.path.normpath(traceback.extract_tb(error.__traceback__)[-1].filename)
    message = str(error)
    ours = f"{os.sep}{PACKAGE}{os.sep}" in where or os.path.basename(where).startswith("train_rdm")
    if isinstance(error, SystemExit):
        ours = message not in ("0", "1", "None")  # argparse's own, after its sentence on stderr, is 2
    listed = isinstance(error, SystemExit | ValueError | OSError | ImportError)
    sentence = listed and (ours or any(name in message for name in names)) and len(message.splitlines()) <= 3
    return Verdict(NOTICED if sentence else TRACEBACK, f"{type(error).__name__}: {message[:300]}")
