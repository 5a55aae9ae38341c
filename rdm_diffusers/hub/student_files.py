"""The files of a student that others get: an allow-list, whether they are whole, and whether a token is in them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import diffusers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from ..families import CARD, INDEX, LORA_FILE, STUDENT_CONFIG, SingleFile, family_of
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
OWN_TEXTS = (CARD, STUDENT_CONFIG, "metrics.json", "evaluation.json")  # tokenizers contain all kinds of addresses


def student_files(folder: Path) -> list[Path]:
    """The files of a student that others get, sorted; all other files in its folder stay private.

    Args:
        folder: a LoRA's, or a whole pipeline's with the components that its `model_index.json` names.

    Raises:
        ValueError: if one of them is a link out of the folder, even a broken one.
    """
    real_path(folder, folder / INDEX)
    components = components_of(folder / INDEX)
    paths = [path for depth in ("*", "*/*") for path in folder.glob(depth)]
    listed = [path for path in paths if is_student_file(path.relative_to(folder).as_posix(), components)]
    for path in listed:
        real_path(folder, path)
    return sorted(path for path in listed if path.is_file())


def copy_files(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    """Copies those files of a student whose names match one of `patterns`, as in `PATTERNS`; links are followed."""
    for file in student_files(source):
        name = file.relative_to(source)
        if _matches(name, patterns):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(real_path(source, file), folder / name)


def _matches(path: PurePath, patterns: Sequence[str]) -> bool:
    return any(len(path.parts) == pattern.count("/") + 1 and path.match(pattern) for pattern in patterns)


def is_student_file(name: str, components: Collection[str]) -> bool:
    """Whether the file at this path, of a folder or a repository, is a student's; a push touches no other file."""
    path = PurePosixPath(name)
    inside = len(path.parts) == 2 and path.parts[0] in components and path.suffix in COMPONENT_SUFFIXES
    return (inside or _matches(path, PATTERNS)) and not path.name.startswith(".")


def components_of(index: Path) -> list[str]:
    """The folders of the components that a `model_index.json` names; none without that file, as in a LoRA's folder."""
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
    student = check_complete(folder)
    loras = [lora.place[0] for lora in student.loras]
    check_available_to_others(*places_of(student.base_model_name_or_path, student.file), student.vae, *loras)
    return student


def check_complete(folder: Path) -> StudentConfig:
    """Refuses a student of which a file or a component is missing, cut off, or not a student's; its configuration.

    Raises:
        ValueError, ImportError: naming it; as `student_files` and `check_lora_file`.
    """
    files = student_files(folder)  # first, because it refuses links out of the folder
    existing = {*files, *(file.parent for file in files)}
    for name in (SCHEDULER, *components_of(folder / INDEX)):
        if folder / name not in existing:
            raise ValueError(f"{folder / name} is missing; {REMEDY}.")
    for file in files:
        if file.suffix == ".safetensors":
            _check_header(file)
    student, scheduler = StudentConfig.load(str(folder)), read_scheduler(folder)
    if student.scheduler_sha256 not in (None, digest_of(scheduler)):
        warn_of_change(folder / SCHEDULER, "scheduler_sha256")
    if student.is_lora:
        component = family_of({"_class_name": student.pipeline_class}).denoiser_name
        check_lora_file(folder / LORA_FILE, component, student.weights_sha256)
    return student


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The configuration of a student's stock scheduler; ValueError if it is damaged, or names no scheduler."""
    path = folder / SCHEDULER
    config = read_object(path, REMEDY, finite=False)
    try:
        check_scheduler(config)
        scheduler_class = getattr(diffusers, config.get("_class_name", ""), None)
        if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
            raise ValueError("it names no scheduler of diffusers")
    except (ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({described(error)}); {REMEDY}.") from error
    return config


def _check_header(weights: Path) -> None:
    """Refuses a file whose size is not what its header says; no tensor is read."""
    try:
        with safe_open(weights, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights} is damaged ({error}); {REMEDY}.") from error


def is_hub_id(name: str) -> bool:
    """Whether a repository could have this name; the full path of a local folder is none."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def places_of(name: str | None, file: SingleFile | None) -> list[str | None]:
    """Where a base model is: its folder or Hub id; for a single file its own place and that of its configuration."""
    return [name] if file is None else [file.repository or file.name, file.config]


def check_available_to_others(*names: str | None) -> None:
    """Raises ValueError for a teacher or autoencoder that others do not have, unlike embedded ones and Hub ids."""
    for name in names:
        if name is not None and not is_tiny(name) and (Path(name).exists() or not is_hub_id(name)):
            kind = "file" if Path(name).is_file() else "folder"
            raise ValueError(
                f"This LoRA student needs {name}, a {kind} that others do not have; train it from the model's id on "
                "the Hub, or make a student that stands alone with rdm-export --format full and push that."
            )


def check_secrets(files: list[Path], token: str | None) -> None:
    """Raises ValueError for a file that contains the token, or anything that looks like one, without showing it.

    Of weights only the header is searched.
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
