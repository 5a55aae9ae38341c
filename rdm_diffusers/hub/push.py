"""Pushes students to the Hub: one commit of a student's files; after an error, one command tries again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from ..families import CARD, INDEX
from ..program import causes
from ..untrusted import real_path, without_secrets
from .student_files import check_secrets, check_student, components_of, is_hub_id, is_student_file, student_files

COMMIT_MESSAGE = "Student of rdm_diffusers"
PATIENCE = 120.0  # seconds to wait for an answer of the Hub; huggingface_hub itself waits forever during uploads
TRANSPORT = "TransportError"  # the name of connection errors in httpx and httpx2
ADVICE = {
    401: "log in again with `hf auth login`",
    403: "make a token that may write there at https://huggingface.co/settings/tokens, or choose another name",
    404: "check the name and the revision",
    429: "wait a while",
}


class PushError(OSError):
    """A push, or the check before it, failed; after a push the message ends with the command that tries again."""


def push_student(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    tag: str | None = None,
    retry: str | None = None,
) -> str:
    """Uploads a student's files in one commit; files that a failed attempt uploaded are not sent again.

    The uploaded card names the repository where the local one names the folder. Local files are only read. All files
    of an earlier student are removed from the repository; other files in it stay.

    Args:
        folder: the student's.
        repo_id: `USER/NAME`, or a name in your own account; the repository is made if it is missing.
        token: with write access; by default that of `hf auth login` or HF_TOKEN.
        private: whether only you may see a new repository; the Hub's default if None.
        revision: a branch, made if it is missing; `main` by default.
        commit_message: the commit's first line.
        tag: a name for the commit; it may not name another commit already.
        retry: the command that an error names; by default the one that pushes this folder.

    Returns:
        The commit's address.

    Raises:
        ValueError: if no repository can have the name, or the folder holds no student, one that others could not
            load, or a token.
        PushError: if the Hub refused it.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    check_student(folder)
    files = student_files(folder)
    check_secrets(files, token or get_token())
    retry = retry or retry_command(folder, repo_id, private, revision, commit_message, tag)
    with opened(repo_id, *unfinished(repo_id, retry), token, private, revision) as (api, repo_id):
        commit = api.create_commit(
            repo_id,
            [*_uploads(folder, files, repo_id), *_removals(api, repo_id, revision, folder, files)],
            commit_message=without_secrets(commit_message or COMMIT_MESSAGE),
            revision=revision,
        )
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True)  # an existing tag stays as it is
            if api.model_info(repo_id, revision=tag, timeout=PATIENCE).sha != commit.oid:
                raise ValueError(f"the commit is there, but the tag {tag} means another one; choose another --tag")
    return str(commit.commit_url)


def check_push(
    repo_id: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> str:
    """Checks, before any long work, that a student can be pushed; makes repository and branch if they are missing.

    Args:
        repo_id, token, private, revision: as in `push_student`.

    Returns:
        The repository's full name.

    Raises:
        ValueError: if no repository can have the name.
        PushError: if there is no token, the Hub cannot be reached, or it would refuse a student.
    """
    check_repo_id(repo_id)
    with opened(repo_id, f"Nothing can be pushed to {repo_id}", ".", token, private, revision) as (_, name):
        return name


def existing_tags(repo_id: str, *, private: bool | None, revision: str | None, retry: str) -> set[str]:
    """The tags of a repository, which is made if it is missing; arguments and errors as in `push_student`."""
    check_repo_id(repo_id)
    with opened(repo_id, *unfinished(repo_id, retry), None, private, revision) as (api, name):
        return {tag.name for tag in api.list_repo_refs(name).tags}


def unfinished(repo_id: str, retry: str) -> tuple[str, str]:
    """How a push's error begins and ends."""
    return f"The push to {repo_id} was not completed", f"; the folder is untouched, try again with: {retry}"


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError for a name that no repository can have."""
    if not is_hub_id(repo_id):
        raise ValueError(
            f"{repo_id!r} is no name of a repository; give NAME or USER/NAME of letters, digits, '-', '_' and '.', at "
            "most 96 characters long."
        )


def retry_command(
    folder: Path,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    message: str | None,
    tag: str | None,
    tag_checkpoints: bool = False,
    space: str | None = None,
) -> str:
    """The command line that pushes a student, for a shell; without a token."""
    options = {"--revision": revision, "--commit_message": message, "--tag": tag, "--space": space}
    switches = {"--private": private, "--tag_checkpoints": tag_checkpoints}
    words = ["rdm-push", str(folder.absolute()), repo_id, *(flag for flag, given in switches.items() if given)]
    return shlex.join([*words, *(word for flag, value in options.items() if value for word in (flag, value))])


@contextmanager
def opened(
    repo_id: str,
    what: str,
    what_next: str,
    token: str | None,
    private: bool | None,
    revision: str | None = None,
    repo_type: str = "model",
) -> Iterator[tuple[HfApi, str]]:
    """The Hub, and the full name of a repository that can be written; both it and the branch are made if missing.

    `repo_type` is `model`, or `space` for one that runs Gradio.

    Meanwhile the Hub has `PATIENCE` to answer, and every error becomes a PushError: what failed, why, and what to do.
    """
    session, token = get_session(), token or get_token()
    before, session.timeout = session.timeout, PATIENCE
    try:
        api = HfApi(token=token)
        yield api, _open(api, repo_id, private, revision, repo_type)
    except Exception as error:
        reason = _reason_of(error).replace(token, "...") if token else _reason_of(error)
        raise PushError(f"{what} ({reason}){what_next}") from error
    finally:
        session.timeout = before


def _open(api: HfApi, repo_id: str, private: bool | None, revision: str | None, repo_type: str) -> str:
    if api.token is None:
        raise ValueError("there is no token; log in with `hf auth login` or set HF_TOKEN")
    repo_id = full_name(api, repo_id)
    kind: dict[str, Any] = {"repo_type": repo_type}
    sdk = "gradio" if repo_type == "space" else None
    api.create_repo(repo_id, private=private, exist_ok=True, space_sdk=sdk, **kind)
    if private and not api.repo_info(repo_id, timeout=PATIENCE, **kind).private:
        raise ValueError("the repository is public; make it private in its settings, or choose another name")
    if revision not in (None, "main"):
        api.create_branch(repo_id, branch=str(revision), exist_ok=True, **kind)
    # Asks how a file would be stored and sends none; a token that may only read is refused.
    api.preupload_lfs_files(repo_id, [CommitOperationAdd(CARD, b"# Student")], revision=revision, **kind)
    return repo_id


def full_name(api: HfApi, repo_id: str) -> str:
    """`USER/NAME` of a repository whose name may lack the user, who is then the token's."""
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def _uploads(folder: Path, files: list[Path], repo_id: str) -> list[CommitOperationAdd]:
    """The files to upload, links resolved, and the card with the repository's name.

    `upload_folder` would make the same commit, but it cannot change the card, and `*` in its patterns also matches `/`,
    so that `pictures/*.png` would delete a user's `pictures/mine/a.png`.
    """
    sources: dict[str, Path | bytes] = {file.relative_to(folder).as_posix(): real_path(folder, file) for file in files}
    if CARD in sources:
        card = (folder / CARD).read_text("utf-8", "surrogateescape")
        card = re.sub(r"^student = .*$", f'student = "{repo_id}"', card, flags=re.MULTILINE)
        sources[CARD] = card.encode("utf-8", "surrogateescape")
    return [CommitOperationAdd(path, source) for path, source in sources.items()]


def _removals(
    api: HfApi, repo_id: str, revision: str | None, folder: Path, files: list[Path]
) -> list[CommitOperationDelete]:
    """The files of an earlier student, which would be loaded together with this one's; never a card."""
    info = api.model_info(repo_id, revision=revision, timeout=PATIENCE)
    names = {file.rfilename for file in info.siblings or []}
    index = api.hf_hub_download(repo_id, INDEX, revision=info.sha) if INDEX in names else None
    components = components_of(Path(index)) if index else []
    stale = names - {CARD, *(file.relative_to(folder).as_posix() for file in files)}
    return [CommitOperationDelete(name) for name in sorted(stale) if is_student_file(name, components)]


def _reason_of(error: BaseException) -> str:
    """Why a request failed, without a line break or a full stop."""
    chain = list(causes(error))
    responses = [response for each in chain if (response := getattr(each, "response", None)) is not None]
    if responses:
        response = responses[0]
        said, advice = response.headers.get("X-Error-Message"), ADVICE.get(response.status_code)
        answer = f"the Hub answered {response.status_code}" + (f' "{_one_line(said)}"' if said else "")
        return f"{answer}: {advice}" if advice else answer
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return "HF_HUB_OFFLINE forbids reaching the Hub; unset it"
    if any("Timeout" in type(each).__name__ for each in chain):
        return "the Hub did not answer in time"
    said = _one_line(str(chain[-1])) or type(chain[-1]).__name__
    is_transport = any(base.__name__ == TRANSPORT for each in chain for base in type(each).__mro__)
    return f"the connection to the Hub failed: {said}" if is_transport else said


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".").replace(". ", "; ")
