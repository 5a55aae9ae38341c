"""From a run's folder to the Hub: the checks before a run, and the pushes after it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..config import RunConfig
from ..families import Lora, SingleFile
from ..folders import aside
from ..hub import check_push, check_space, check_student, push_space, push_student, write_card
from ..hub.push import existing_tags, retry_command, unfinished
from ..hub.student_files import check_available_to_others, is_hub_id, places_of
from ..program import status_of
from ..untrusted import real_path
from .checkpoint_files import list_checkpoints, name_of
from .exporting import export_checkpoint, read_run


def check_hub(config: RunConfig, accelerator: Accelerator) -> None:
    """Checks that the finished student can be pushed, and makes its repository; a dry run makes none.

    Raises:
        ValueError: if others could not load the student, or the repository cannot have its name.
        OSError: if the Hub would refuse it.
    """
    hub, teacher = config.hub, config.teacher
    if not hub.push_to_hub or config.output.dry_run or not accelerator.is_main_process:
        return
    if config.is_lora:
        loras = [Lora.parse(each).place[0] for each in teacher.teacher_lora]
        own = loras if config.student_base == "teacher" else []
        name = teacher.pretrained_model_name_or_path
        places = places_of(name, SingleFile.of(name, teacher.single_file_config))
        check_available_to_others(*places, teacher.pretrained_vae_model_name_or_path, *own)
    check_push(repository(config), private=hub.hub_private_repo, revision=hub.hub_revision)


def publish(config: RunConfig) -> str:
    """Pushes a run's finished student; the commit's address. Errors as in `push_run`."""
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
    space: str | None = None,
) -> str:
    """Pushes a run's student, and if asked those of its checkpoints before it; then its Space, and prints where it is.

    Args:
        folder: the run's.
        repo_id, private, revision, commit_message, tag: as in `push_student`.
        tag_checkpoints: whether the student of every `checkpoint-N` in the folder becomes a commit with a tag of that
            name, unless the repository has that tag.
        space: the name of a Space that shows the student; None for none.

    Returns:
        The address of the last commit.

    Raises:
        ValueError, OSError, ImportError: as `push_student` and `push_space`.
        SystemExit: on Ctrl-C, after a sentence with the command that tries again, and with the status that shells know.
    """
    retry = retry_command(folder, repo_id, private, revision, commit_message, tag, tag_checkpoints, space)
    if space:
        check_space(space)
    where: dict[str, Any] = {"private": private, "revision": revision, "retry": retry}
    try:
        if tag_checkpoints:
            check_student(folder)
            _push_checkpoints(folder, repo_id, where)
        address = push_student(folder, repo_id, commit_message=commit_message, tag=tag, **where)
        if space:
            print(f"The student's Space is at {push_space(folder, repo_id, space, **where)}")
        return address
    except KeyboardInterrupt:
        begin, end = unfinished(repo_id, retry)
        print(f"\n{begin} (interrupted){end}", file=sys.stderr)
        raise SystemExit(status_of(signal.SIGINT)) from None


def _push_checkpoints(run: Path, repo_id: str, where: dict[str, Any]) -> None:
    checkpoints, tags = list_checkpoints(run), existing_tags(repo_id, **where)
    skipped = [name for name in map(name_of, checkpoints) if name in tags]
    if skipped:
        print(f"{repo_id} has tags of these names already, perhaps another run's; not pushed: {', '.join(skipped)}.")
    for checkpoint in checkpoints:
        if name_of(checkpoint) not in tags:
            _push_checkpoint(checkpoint, repo_id, where)


def _push_checkpoint(checkpoint: Path, repo_id: str, where: dict[str, Any]) -> None:
    run, name = checkpoint.parent, name_of(checkpoint)
    with aside(run) as hidden:
        student = hidden / run.resolve().name  # the file for ComfyUI is named after it
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
