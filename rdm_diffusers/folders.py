"""Files and folders that survive a kill: synced, locked during writing, written aside; and their digests."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ASIDE, LOCK, PARTIAL = ".rdm-export-", ".lock", ".partial-"
_held: set[int] = set()  # descriptors of locks


class HeldError(ValueError):
    """A living process holds the lock. The message names it if possible."""


def _release_in_child() -> None:
    """A forked child would otherwise keep the lock of a parent that was killed."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_release_in_child)


def digest_of_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, wait: bool = False, refusal: str = "{holder}") -> Iterator[bool]:
    """Holds a lock, which ends with the process, however that ends. Its file exists only while it is held.

    `filelock` is not used: without `flock` it falls back to files, which dead processes hold for ever.

    Args:
        path: of the lock's file.
        wait: for another process to release it, instead of raising.
        refusal: the message of `HeldError`, in which the process that holds the lock replaces `{holder}`.

    Yields:
        Whether the lock is held; False if the file system has no locks.

    Raises:
        HeldError: if a living process holds it and `wait` is False.
    """
    descriptor = _take(path, wait, refusal)
    try:
        yield descriptor is not None
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _take(path: Path, wait: bool, refusal: str) -> int | None:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:  # the lock is held, or the file system has no locks
            holder = os.read(descriptor, 200).decode("utf-8", "replace") or "another process"
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise HeldError(refusal.replace("{holder}", holder)) from None
            return None
        if os.fstat(descriptor).st_nlink:  # else its holder has just removed it
            break
        os.close(descriptor)
    _held.add(descriptor)
    with suppress(OSError):  # on a full disk the holder stays anonymous
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


@contextmanager
def aside(parent: Path) -> Iterator[Path]:
    """An empty hidden folder in `parent`, removed at the end. Those that killed processes left are removed first.

    Raises:
        OSError: if it cannot be written.
    """
    clear_aside(parent)
    folder = parent / f"{ASIDE}{uuid.uuid4().hex[:8]}"
    with locked(folder.with_name(folder.name + LOCK)):  # first, so that nobody clears the folder
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def clear_aside(parent: Path, rescue: Callable[[Path], None] = lambda folder: None) -> None:
    """Removes the hidden folders that dead processes left in `parent`, after calling `rescue` on each."""
    pattern = re.compile(rf"{re.escape(ASIDE)}[0-9a-f]{{8}}")
    for name in {path.name.removesuffix(LOCK) for path in parent.glob(f"{ASIDE}*")}:
        if pattern.fullmatch(name):
            with suppress(HeldError), locked(parent / (name + LOCK)) as held:
                if held and (parent / name).is_dir():
                    rescue(parent / name)
                    shutil.rmtree(parent / name, ignore_errors=True)


def aside_of(path: Path) -> Path:
    """The path at which a file is written before it gets its name."""
    return path.with_name(f"{PARTIAL}{path.name}")


def write_whole(path: Path, text: str) -> None:
    """Writes a UTF-8 text file as a whole or not at all. An older file, or a link, is replaced at the end."""
    partial = aside_of(path)
    partial.unlink(missing_ok=True)  # what a kill left, or a link
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of entries, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until a folder and everything in it is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
