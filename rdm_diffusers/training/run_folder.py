"""A run's folder: it is writable, one run uses it at a time, and only the same run resumes in it."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..config import OutputConfig, RunConfig, all_settings
from ..config.checks import IMAGES
from ..config.presets import DERIVED, SOURCES
from ..config.retired import without_retired
from ..evaluation.records import digest_of_texts
from ..families import SingleFile, full_name
from ..folders import LOCK, locked
from ..hub import finish_exports
from ..pipelines import is_student
from .best import check_best
from .checkpoint_files import find_checkpoint, read_record, set_newer_aside, tidy
from .checkpoints import TrainState, load_checkpoint
from .user_images import UserImages

RUN_LOCK = f".run{LOCK}"
FREE_ON_RESUME = {each.name for each in all_settings() if each.flag.free} | {"command"}
# Where the prompts come from is free, too, if their digest says that they are the same.
PROMPTS, PROMPTS_DIGEST = {
    "prompts_file", "dataset_name", "dataset_config_name", "dataset_split", "caption_column", "max_train_samples",
}, "prompts_sha256"  # fmt: skip
LORAS_DIGEST = "loras_sha256"
FILE_DIGEST = "file_sha256"  # of a teacher that is a single file
IMAGES_DIGEST = "images_sha256"  # of the user's images, wherever they are


def make_writable(folder: str | Path, flag: str) -> None:
    """Makes a folder that a flag names; ValueError if it cannot be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a name of its own for every process
            pass
    except OSError as error:
        raise ValueError(f"{flag} {folder} cannot be written ({error.strerror}); choose another.") from error


def prepare_output(output: OutputConfig) -> Path:
    """Makes the output folder; ValueError if it cannot be written, or holds another run and nothing says to resume."""
    folder = Path(output.output_dir)
    make_writable(folder, "--output_dir")
    if output.resume_from_checkpoint is None and (any(folder.glob("checkpoint-*")) or is_student(folder)):
        raise ValueError(
            f"--output_dir {folder} holds the checkpoints or the student of another run; add --resume_from_checkpoint "
            "latest, or choose another folder."
        )
    return folder


@contextmanager
def locked_for_run(folder: Path, accelerator: Accelerator, changes: bool = True) -> Iterator[None]:
    """Inside, no other run writes into the folder, and what a killed one left half done is in order.

    One process holds the lock, and the others wait for it. A dry run (`changes` is False) changes nothing and needs no
    lock. Readers of the folder, such as rdm-export and rdm-push, need none either.

    Raises:
        ValueError: if another run uses the folder.
    """
    if not (accelerator.is_main_process and changes):
        accelerator.wait_for_everyone()
        yield
        return
    refusal = (
        f"--output_dir {folder} is in use by another run ({{holder}}); wait until it ends, stop it, or choose another "
        "folder."
    )
    with locked(folder / RUN_LOCK, refusal=refusal) as held:
        if not held:
            warnings.warn(
                f"The file system of {folder} has no locks, so nobody would notice a second run in this folder; "
                "make sure that there is none.",
                stacklevel=2,
            )
        tidy(folder)
        finish_exports(folder)
        accelerator.wait_for_everyone()
        yield


def checkpoint_to_resume(folder: Path, config: RunConfig) -> Path | None:
    """The checkpoint that the run resumes from, None if it begins; ValueError if it is missing or too far on."""
    if not config.output.resume_from_checkpoint:
        return None
    check_best(folder, config.validation)
    checkpoint = find_checkpoint(folder, config.output.resume_from_checkpoint)
    done, wanted = read_record(checkpoint)["update"], config.optimisation.max_train_steps
    if done > wanted:
        raise ValueError(
            f"--max_train_steps {wanted} is less than the {done} updates of {checkpoint}; raise it, "
            "resume from an earlier checkpoint, or make a student of an earlier one with rdm-export."
        )
    return checkpoint


def arguments_of(
    config: RunConfig, prompts: Sequence[str], images: UserImages | None, num_processes: int
) -> dict[str, Any]:
    """What a run's checkpoints and its student record of how it was trained: its settings, and digests of its files."""
    arguments = {
        **config.as_arguments(),
        "command": config.command,
        "num_processes": num_processes,
        "prompts_sha256": digest_of_texts(prompts),
        "images_sha256": images.digest if images else None,
    }
    if config.loras:
        arguments["loras_sha256"] = [lora.digest() for lora in config.loras]
    return arguments | _file_record(config)


def _file_record(config: RunConfig) -> dict[str, Any]:
    """What checkpoints record of a teacher that is a single file: the configuration that it has, and its digest.

    A dry run that begins reads no more than the file's header, and records no digest.
    """
    file = SingleFile.of(config.teacher.pretrained_model_name_or_path, config.teacher.single_file_config)
    if file is None:
        return {}
    only_header = config.output.dry_run and not config.output.resume_from_checkpoint
    return {"single_file_config": full_name(file.config), **({} if only_header else {FILE_DIGEST: file.digest()})}


def check_resumable(arguments: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuses to resume with arguments that would make another run of it.

    Args:
        arguments: the run's, as its checkpoints will record them.
        saved: those that its checkpoint recorded.

    Raises:
        ValueError: naming the flags that differ, or saying that the prompts do.
    """
    now = json.loads(json.dumps(arguments))
    then = without_retired(saved)
    # Older releases recorded folders as they were given.
    names = {name: full_name(then[name]) for name in SOURCES if then.get(name)}
    # What an older release did not record was as the defaults are; what follows from other flags follows from those.
    settings = (each for each in all_settings(now["student"]) if each.name not in DERIVED)
    usual = {each.name: None if each.is_repeatable else each.default for each in settings}
    then = {IMAGES_DIGEST: None, **usual, **then, **names}
    falls = not now["lr_scheduler"].startswith("constant") or now["reward_scheduler"] != "constant"
    free = FREE_ON_RESUME - ({"max_train_steps"} if falls else set())
    free |= set(IMAGES)
    free |= PROMPTS if {PROMPTS_DIGEST} <= now.keys() & then.keys() else {PROMPTS_DIGEST}  # version 0.1.0 had none
    changed = [name for name in then if name not in free and now.get(name) != then[name]]
    if changed:
        differences = {name: f"--{name} (was {then[name]}, is {now.get(name)})" for name in changed}
        named = {
            PROMPTS_DIGEST: "other prompts",
            IMAGES_DIGEST: "other images",
            FILE_DIGEST: "another teacher's file under the same name",
            LORAS_DIGEST: "other contents of --teacher_lora or --init_lora",
        }
        flags = ", ".join((differences | named)[name] for name in changed)
        raise ValueError(f"The checkpoint was made with other arguments: {flags}; set them back or start a new run.")


def resume_from(checkpoint: Path, folder: Path, state: TrainState, accelerator: Accelerator) -> None:
    """Loads a checkpoint, and sets newer ones in the folder aside, which belong to a course that this run leaves."""
    load_checkpoint(checkpoint, state)
    place = set_newer_aside(folder, checkpoint) if accelerator.is_main_process else None
    if place is not None:
        print(f"The run goes back to {checkpoint.name}; the newer checkpoints are now in {place}.")
