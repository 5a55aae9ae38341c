"""A run's folder and its resumption: what can be wrong with them, before any long work starts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import OutputConfig, all_settings
from ..config.filling import TEACHER, VAE
from ..config.retired import without_retired
from ..families import full_name
from ..pipelines import is_student

FREE_ON_RESUME = {each.name for each in all_settings() if each.flag.free} | {"command"}
# Where the prompts come from is free, too, if their digest says that they are the same.
PROMPTS, PROMPTS_DIGEST = {
    "prompts_file", "dataset_name", "dataset_config_name", "dataset_split", "caption_column", "max_train_samples",
}, "prompts_sha256"  # fmt: skip


def prepare_output(output: OutputConfig) -> Path:
    """Makes the output folder.

    Raises:
        ValueError: if it cannot be written, or holds another run and nothing says to resume.
    """
    folder = Path(output.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a name of its own for every process
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written ({error.strerror}); choose another.") from error
    if output.resume_from_checkpoint is None and (any(folder.glob("checkpoint-*")) or is_student(folder)):
        raise ValueError(
            f"--output_dir {folder} holds the checkpoints or the student of another run; add --resume_from_checkpoint "
            "latest, or choose another folder."
        )
    return folder


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
    names = {name: full_name(then[name]) for name in (TEACHER, VAE) if then.get(name)}
    then = {"dataset_split": "train", **then, **names}
    free = FREE_ON_RESUME - (set() if now["lr_scheduler"].startswith("constant") else {"max_train_steps"})
    free |= PROMPTS if {PROMPTS_DIGEST} <= now.keys() & then.keys() else {PROMPTS_DIGEST}  # version 0.1.0 had none
    changed = [name for name in then if name not in free and now.get(name) != then[name]]
    if changed:
        differences = {name: f"--{name} (was {then[name]}, is {now.get(name)})" for name in changed}
        flags = ", ".join((differences | {PROMPTS_DIGEST: "other prompts"})[name] for name in changed)
        raise ValueError(f"The checkpoint was made with other arguments: {flags}; set them back or start a new run.")
