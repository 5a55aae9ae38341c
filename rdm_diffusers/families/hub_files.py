"""Files from the Hub: with whose token, and what can go wrong, each said in one sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LOG_IN = "log in with `hf auth login` or give a token"
FULL_DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# The first that an error or one of its causes is, gives the reason.
REASONS: dict[type[Exception], str] = {
    GatedRepoError: "is gated; accept its terms at https://huggingface.co/{repository} and " + LOG_IN,
    RepositoryNotFoundError: "is no local folder and could not be found on the Hub; check its name, and "
    + LOG_IN + " if it is private",
    RevisionNotFoundError: "has no revision {revision!r}; give a branch, tag or commit of it",
    LocalEntryNotFoundError: "is no local folder, is not in the cache, and the Hub cannot be reached; check its name "
    "and your connection",
    EntryNotFoundError: "lacks a file that every {what} has, so it is none; check its name",
    HFValidationError: "is neither a folder nor a name as the Hub has them; check it",
    HTTPError: "could not be downloaded ({error}); load it again, what has arrived is kept",
}  # fmt: skip


def use_token(token: str | None) -> None:
    """From now on huggingface_hub uses this token wherever it is given none; None changes nothing."""
    if token is not None:
        os.environ["HF_TOKEN"] = token


def fetch(what: str, repository: str, filename: str, **hub_options) -> Path:
    """A file of a Hub repository, from the cache where it is there.

    Args:
        what: the kind of repository, for the error's sentence: `student` or `teacher`.
        repository: its id.
        filename: the file's path in it.
        hub_options: as of `hf_hub_download`: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError: if it cannot be had, saying why and what to do.
    """
    with coming_from_hub(what, repository, hub_options.get("revision")):
        return Path(hf_hub_download(repository, filename, **hub_options))


def repository_files(repository: str, revision: str | None = None, token: str | None = None, **_: object) -> list[str]:
    """The paths of a Hub repository's files; none where the Hub cannot be asked, as offline."""
    try:
        return HfApi().list_repo_files(repository, revision=revision, token=token)
    except (
        HTTPError,
        OSError,
        HFValidationError,
    ):  # what then loads it says so, if it must
        return []


@contextmanager
def coming_from_hub(what: str, repository: str, revision: str | None = None) -> Iterator[None]:
    """Turns the Hub's errors, and a full disk, into one sentence that says what to do; see `fetch`."""
    try:
        yield
    except Exception as error:
        causes = list(_with_causes(error))
        if any(isinstance(each, OSError) and each.errno in FULL_DISK for each in causes):
            reason = "does not fit on the disk; free some space and load it again"
        else:
            kinds = (kind for kind in REASONS if any(isinstance(each, kind) for each in causes))
            kind = next(kinds, None)
            if kind is None:
                raise
            reason = REASONS[kind].format(what=what, repository=repository, revision=revision, error=_short(error))
        raise ValueError(f"The {what} {repository!r} {reason}.") from error


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _short(error: Exception) -> str:
    """An error's kind and first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"
