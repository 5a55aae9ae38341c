"""From a run's folder to the Hub: what is made sure of before a run, and the pushes after it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..config import RunConfig
from ..folders import aside
from ..hub import (
    check_base,
    check_push,
    check_student,
    is_hub_id,
    known_tags,
    push_student,
    retry_command,
    unfinished,
    write_card,
)
from ..program import status_of
from ..untrusted import real_path
from .checkpoint_files import list_checkpoints, name_of
from .exporting import export_checkpoint, read_run


def check_hub(config: RunConfig, accelerator: Accelerator) -> None:
    """Makes sure that the student can be pushed when it is done, and makes its repository; a dry run makes none.

    Raises:
        ValueError: if others could not load the student, or the repository cannot have its name.
        OSError: if the Hub would not take it.
    """
    hub, teacher = config.hub, config.teacher
    if not hub.push_to_hub or config.output.dry_run or not accelerator.is_main_process:
        return
    if config.is_lora:
        check_base(teacher.pretrained_model_name_or_path, teacher.pretrained_vae_model_name_or_path)
    check_push(repository(config), private=hub.hub_private_repo, revision=hub.hub_revision)


def publish(config: RunConfig) -> str:
    """Pushes a run's finished student; the commit's address.

    Raises:
        OSError: if the Hub did not take it, with the command that tries again.
    """
    hub = config.hub
    return push_run(
        Path(config.output.output_dir),
        repository(config),
        private=hub.hub_private_repo,
        revision=hub.hub_revision,
        commit_message=hub.hub_commit_message,
        tag_checkpoints=hub.hub_tag_checkpoints,
    )


def push_run(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    tag: str | None = None,
    tag_checkpoints: bool = False,
) -> str:
    """Pushes a run's student, if asked after those of its checkpoints.

    Args:
        folder: the run's.
        repo_id, private, revision, commit_message, tag: as in `push_student`.
        tag_checkpoints: whether the student of every `checkpoint-N` in the folder becomes a commit with a tag of that
            name; those whose tag is on the Hub are left as they are.

    Returns:
        The address of the last commit.

    Raises:
        ValueError, OSError: as `push_student`.
        SystemExit: on Ctrl-C, after a sentence with the command that tries again.
    """
    retry = retry_command(folder, repo_id, private, revision, commit_message, tag, tag_checkpoints)
    where: dict[str, Any] = {"private": private, "revision": revision, "retry": retry}
    with retryable(repo_id, retry):
        if tag_checkpoints:
            check_student(folder)
            _push_checkpoints(folder, repo_id, where)
        return push_student(folder, repo_id, commit_message=commit_message, tag=tag, **where)


@contextmanager
def retryable(repo_id: str, retry: str) -> Iterator[None]:
    """Lets Ctrl-C end the program with the command that tries again, and with the status that shells know it by."""
    try:
        yield
    except KeyboardInterrupt:
        begin, end = unfinished(repo_id, retry)
        print(f"\n{begin} (interrupted){end}", file=sys.stderr)
        raise SystemExit(status_of(signal.SIGINT)) from None


def _push_checkpoints(folder: Path, repo_id: str, where: dict[str, Any]) -> None:
    checkpoints, known = list_checkpoints(folder), known_tags(repo_id, **where)
    left = [name for name in map(name_of, checkpoints) if name in known]
    if left:
        print(f"{repo_id} has tags of these names already, perhaps another run's; not pushed: {', '.join(left)}.")
    for checkpoint in checkpoints:
        if name_of(checkpoint) not in known:
            _push_checkpoint(checkpoint, repo_id, where)


def _push_checkpoint(checkpoint: Path, repo_id: str, where: dict[str, Any]) -> None:
    run, name = checkpoint.parent, name_of(checkpoint)
    with aside(run) as hidden:
        student = hidden / run.resolve().name  # which the file for ComfyUI is named after
        student.mkdir()
        source = real_path(run, checkpoint)
        export_checkpoint(source, read_run(source), student)
        write_card(student, repo_id)
        push_student(student, repo_id, commit_message=name, tag=name, **where)


def repository(config: RunConfig) -> str:
    """The name to push to, by default that of the output folder.

    Raises:
        ValueError: if no repository can have the folder's name.
    """
    name = Path(config.output.output_dir).resolve().name
    if not config.hub.hub_model_id and not is_hub_id(name):
        raise ValueError(
            f"--output_dir gives the repository the name {name!r}, which the Hub does not allow; give another with "
            "--hub_model_id."
        )
    return config.hub.hub_model_id or name
