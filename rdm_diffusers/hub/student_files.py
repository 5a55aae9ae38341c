"""What of a student's folder is for others: an allow-list, and a look for tokens in it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import diffusers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from ..families import CARD, INDEX, LORA_FILE, STUDENT_CONFIG, family_of
from ..pipelines import StudentConfig, is_student
from ..pipelines.lora_file import check_lora_file
from ..pipelines.student_config import REMEDY, check_scheduler, warn_of_change
from ..tiny import is_tiny
from ..untrusted import TOKEN as HUB_TOKEN, described, digest_of, has_secret, read_object, real_path

SCHEDULER = "scheduler/scheduler_config.json"
PATTERNS = (
    CARD, STUDENT_CONFIG, "samples.png", "pictures/*.png", "metrics.json", "evaluation.json", LORA_FILE,
    "comfyui/*.safetensors", "scheduler/*.json", INDEX,
)  # fmt: skip
COMPONENT_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
TOKEN = re.compile(HUB_TOKEN.pattern.encode())
OWN_TEXTS = (CARD, STUDENT_CONFIG, "metrics.json", "evaluation.json")  # tokenizers know of all kinds of addresses


def student_files(folder: Path) -> list[Path]:
    """The files of a student that are for others, sorted; all else in its folder stays at home.

    Args:
        folder: the student's: a LoRA, or a whole pipeline with the components that its `model_index.json` names.

    Raises:
        ValueError: if one of them is a link out of the folder, whether it leads to anything or not.
    """
    real_path(folder, folder / INDEX)
    components = components_of(folder / INDEX)
    found = [path for depth in ("*", "*/*") for path in folder.glob(depth)]
    named = [path for path in found if is_students(path.relative_to(folder).as_posix(), components)]
    for path in named:
        real_path(folder, path)
    return sorted(path for path in named if path.is_file())


def copy_files(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    """Copies a student's files, what links stand for included.

    Args:
        source: the student's folder.
        folder: another one.
        patterns: of the names that are copied, as in `PATTERNS`.

    Raises:
        ValueError: as `student_files`.
    """
    for file in student_files(source):
        name = file.relative_to(source)
        if any(len(name.parts) == pattern.count("/") + 1 and name.match(pattern) for pattern in patterns):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(real_path(source, file), folder / name)


def is_students(name: str, components: Collection[str]) -> bool:
    """Whether a file of this name, in a folder or a repository, is a student's; nothing else is pushed or replaced.

    Args:
        name: its path there.
        components: the folders of a whole pipeline's components (`components_of`).
    """
    path = PurePosixPath(name)
    listed = any(len(path.parts) == pattern.count("/") + 1 and path.match(pattern) for pattern in PATTERNS)
    inside = len(path.parts) == 2 and path.parts[0] in components and path.suffix in COMPONENT_SUFFIXES
    return (listed or inside) and not path.name.startswith(".")


def components_of(index: Path) -> list[str]:
    """The folders of the components that a `model_index.json` names; none without that file, as in a LoRA's folder.

    Raises:
        ValueError: if it is damaged.
    """
    if not index.is_file():
        return []
    entries = read_object(index, REMEDY).items()
    return [name for name, entry in entries if isinstance(entry, list) and any(entry[:1]) and name.isidentifier()]


def check_student(folder: Path) -> StudentConfig:
    """The configuration of a student that others can load from the Hub.

    Raises:
        ValueError: if the folder holds no student, an incomplete one, or one that needs a folder of this machine.
    """
    if not is_student(folder) or not any((folder / name).is_file() for name in (LORA_FILE, INDEX)):
        raise ValueError(f"{folder} holds no student; give the --output_dir of a finished training run.")
    student_files(folder)  # first, as links may lead to what is no student's
    student = StudentConfig.load(str(folder))
    check_base(student.base_model_name_or_path, student.vae)
    check_complete(folder)
    return student


def check_complete(folder: Path) -> None:
    """Refuses a student of which a file or a component is missing, cut off, or not what a student's is.

    Raises:
        ValueError, ImportError: naming it; as `student_files` and `check_lora_file`.
    """
    files = student_files(folder)
    there = {*files, *(file.parent for file in files)}
    for name in (SCHEDULER, *components_of(folder / INDEX)):
        if folder / name not in there:
            raise ValueError(f"{folder / name} is missing; download or export the student again.")
    for file in files:
        if file.suffix == ".safetensors":
            _check_opens(file)
    student, scheduler = StudentConfig.load(str(folder)), read_scheduler(folder)
    if student.scheduler_sha256 not in (None, digest_of(scheduler)):
        warn_of_change(folder / SCHEDULER, "scheduler_sha256")
    if student.is_lora:
        component = family_of({"_class_name": student.pipeline_class}).denoiser_name
        check_lora_file(folder / LORA_FILE, component, student.weights_sha256)


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The configuration of a student's stock scheduler.

    Raises:
        ValueError: if it is damaged, or names no scheduler of diffusers.
    """
    path = folder / SCHEDULER
    config = read_object(path, REMEDY, finite=False)
    try:
        check_scheduler(config)
        found = getattr(diffusers, config.get("_class_name", ""), None)
        if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
            raise ValueError("it names no scheduler of diffusers")
    except (ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({described(error)}); {REMEDY}.") from error
    return config


def _check_opens(weights: Path) -> None:
    """Only the header is read, whose sizes are compared with the file's."""
    try:
        with safe_open(weights, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights} is damaged ({error}); download or export the student again.") from error


def is_hub_id(name: str) -> bool:
    """Whether a repository could have this name; a local folder's full path is none."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_base(*names: str | None) -> None:
    """Refuses a LoRA student of a teacher, or with an autoencoder, that others do not have.

    Args:
        names: what it is loaded with; embedded teachers and Hub ids can be had by all.

    Raises:
        ValueError: saying what to do.
    """
    for name in names:
        if name is not None and not is_tiny(name) and (Path(name).is_dir() or not is_hub_id(name)):
            raise ValueError(
                f"This LoRA student needs {name}, a folder that others do not have; train it from the model's id on "
                "the Hub, or make a student that stands alone with rdm-export --format full and push that."
            )


def check_secrets(files: list[Path], token: str | None) -> None:
    """Refuses files in which the token stands, or anything that looks like one.

    Of weights only the part that is text is read.

    Raises:
        ValueError: naming the file, never the token.
    """
    for file in files:
        text = _text_of(file)
        if TOKEN.search(text) or (token and token.encode() in text):
            raise ValueError(f"{file} holds what looks like an access token of the Hub; take it out before you push.")
        if file.name in OWN_TEXTS and has_secret(text.decode("utf-8", "replace")):
            raise ValueError(f"{file} holds an address with what looks like a password; take it out before you push.")


def _text_of(file: Path) -> bytes:
    with open(file, "rb") as stream:
        if file.suffix != ".safetensors":
            return stream.read()
        return stream.read(min(int.from_bytes(stream.read(8), "little"), file.stat().st_size))
