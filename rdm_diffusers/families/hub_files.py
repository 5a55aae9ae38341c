"""Files from the Hub; what can go wrong is explained in one sentence."""

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
# The first class that an error or one of its causes belongs to gives the reason.
REASONS: dict[type[Exception], str] = {
    GatedRepoError: "is gated; accept its terms at https://huggingface.co/{repository} and " + LOG_IN,
    RepositoryNotFoundError: "is not a local folder and was not found on the Hub; check its name, and "
    + LOG_IN + " if it is private",
    RevisionNotFoundError: "has no revision {revision!r}; give one of its branches, tags or commits",
    LocalEntryNotFoundError: "is neither a local folder nor in the cache, and the Hub cannot be reached; check its "
    "name and your connection",
    EntryNotFoundError: "lacks a file that every {what} has; check its name",
    HFValidationError: "is neither a local folder nor a valid Hub id; check its name",
    HTTPError: "could not be downloaded ({error}); try again, finished files are kept",
}  # fmt: skip


def use_token(token: str | None) -> None:
    """Makes huggingface_hub use this token by default; None changes nothing."""
    if token is not None:
        os.environ["HF_TOKEN"] = token


def fetch(what: str, repository: str, filename: str, **hub_options) -> Path:
    """A file of a Hub repository, from the cache if it is there.

    Args:
        what: the kind of repository, for the error's sentence: `student` or `teacher`.
        repository: its id.
        filename: the file's path in it.
        hub_options: as of `hf_hub_download`: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError: if it cannot be downloaded, saying why and what to do.
    """
    with explain_hub_errors(what, repository, hub_options.get("revision")):
        return Path(hf_hub_download(repository, filename, **hub_options))


def repository_files(repository: str, revision: str | None = None, token: str | None = None, **_: object) -> list[str]:
    """The paths of a Hub repository's files; none if the Hub cannot be reached, which loading then reports."""
    try:
        return HfApi().list_repo_files(repository, revision=revision, token=token)
    except (HTTPError, OSError, HFValidationError):
        return []


@contextmanager
def explain_hub_errors(what: str, repository: str, revision: str | None = None) -> Iterator[None]:
    """Turns the Hub's errors, and a full disk, into a ValueError that says what to do; see `fetch`."""
    try:
        yield
    except Exception as error:
        chain: list[BaseException] = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        kind = next((kind for kind in REASONS if any(isinstance(each, kind) for each in chain)), None)
        if any(isinstance(each, OSError) and each.errno in FULL_DISK for each in chain):
            reason = "does not fit on the disk; free some space and load it again"
        elif kind is None:
            raise
        else:
            first_line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            short = f"{type(error).__name__}: {first_line}"
            reason = REASONS[kind].format(what=what, repository=repository, revision=revision, error=short)
        raise ValueError(f"The {what} {repository!r} {reason}.") from error
