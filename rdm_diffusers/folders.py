"""Files and folders that outlive a kill: synced, locked while they are written, written aside; and their digests."""

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
    """A living process holds the lock; the message says which, as far as it is known."""


def _let_go() -> None:
    """In a forked child, which would go on holding the lock of a parent that was killed."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


def digest_of_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Holds a lock that ends with the process, however that ends; the file is there as long as it is held.

    `filelock` is not used, because where `flock` is missing it falls back to files, which the dead hold for ever.

    Args:
        path: the lock's file.
        wait: whether to wait until no living process holds it.

    Yields:
        Whether there is a lock; False where the file system has none.

    Raises:
        HeldError: if a living process holds it, unless `wait` is set.
    """
    descriptor = _take(path, wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _take(path: Path, wait: bool = False) -> int | None:
    while True:
        descriptor = None
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            _refuse_held(descriptor, error)
            return None
        if os.fstat(descriptor).st_nlink:  # else its holder removed it in the meantime
            break
        os.close(descriptor)
    _held.add(descriptor)
    with suppress(OSError):  # on a full disk nobody can read who holds it
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _refuse_held(descriptor: int | None, error: OSError) -> None:
    """Says who holds a lock; any other error is that of a file system without locks."""
    if descriptor is None:
        return
    holder = os.read(descriptor, 200).decode("utf-8", "replace")
    os.close(descriptor)
    if isinstance(error, BlockingIOError):
        raise HeldError(holder or "another process") from None


@contextmanager
def aside(parent: Path) -> Iterator[Path]:
    """An empty hidden folder, which is removed at the end; what killed processes left there goes first.

    Args:
        parent: the folder that it is made in.

    Raises:
        OSError: if it cannot be written.
    """
    clear_aside(parent)
    folder = parent / f"{ASIDE}{uuid.uuid4().hex[:8]}"
    with locked(folder.with_name(folder.name + LOCK)):  # before there is a folder, so that nobody clears it
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def clear_aside(parent: Path, rescue: Callable[[Path], None] = lambda folder: None) -> None:
    """Removes the hidden folders of processes that are dead.

    Args:
        parent: where they are.
        rescue: is called with each before.
    """
    pattern = re.compile(rf"{re.escape(ASIDE)}[0-9a-f]{{8}}")
    for name in {path.name.removesuffix(LOCK) for path in parent.glob(f"{ASIDE}*")}:
        if pattern.fullmatch(name):
            with suppress(HeldError), locked(parent / (name + LOCK)) as known:
                if known and (parent / name).is_dir():
                    rescue(parent / name)
                    shutil.rmtree(parent / name, ignore_errors=True)


def aside_of(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f"{PARTIAL}{path.name}")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, in UTF-8, that is there as a whole or not at all; what was there before stays until then.

    A link in its place is replaced, not followed.
    """
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
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until all that is in a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
