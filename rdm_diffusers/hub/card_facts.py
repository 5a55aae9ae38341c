"""What a student's folder tells of it, for its card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..families import absent_components, fetch, pipeline_config
from ..pipelines import StudentConfig
from ..tiny import is_tiny
from .card_metrics import EVALUATION_FILE, METRICS_FILE, read_if_there

CARD = "README.md"
LICENSE_TAGS = ("license", "license_name", "license_link")
PROMPT = "a photograph of an astronaut riding a horse"  # where nothing says what the teacher draws
TINY_PROMPT = "a red seven on a blue background"


@dataclass(frozen=True)
class CardFacts:
    """All that a card tells.

    Args:
        name: what the student is loaded by: a folder or a Hub id.
        student: its configuration.
        scheduler: the configuration of its stock scheduler.
        license: the base model's tags of `LICENSE_TAGS`.
        absent: components that the base model, or a full student, was saved without.
        vae_class: the class of the autoencoder, for a student with another one than its base model's.
        prompts: of the pictures, or else one as an example.
        pictures: paths of the student's pictures in the folder, one a prompt.
        comfyui: path of the file for ComfyUI in the folder, if there is one.
        samples: whether there is a `samples.png`.
        metrics, evaluation: what those files hold, if they are there.
        trained: False for a card that waits for its student.
    """

    name: str
    student: StudentConfig
    scheduler: Mapping[str, Any]
    license: Mapping[str, str] = field(default_factory=dict)
    absent: Sequence[str] = ()
    vae_class: str | None = None
    prompts: Sequence[str] = (PROMPT,)
    pictures: Sequence[str] = ()
    comfyui: str | None = None
    samples: bool = False
    metrics: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    trained: bool = True

    @property
    def teacher(self) -> str:
        """The base model by its name; never this machine's path to it."""
        return Path(self.student.teacher or "an unknown teacher").name if self.is_local else str(self.student.teacher)

    @property
    def is_embedded(self) -> bool:
        """Whether the base model is one of this package's own."""
        return is_tiny(self.student.teacher or "")

    @property
    def is_local(self) -> bool:
        """Whether the base model is nothing that the Hub knows."""
        return not is_on_hub(self.student.teacher or "")


def is_on_hub(teacher: str) -> bool:
    """Whether a base model's name is a Hub id; folders are recorded by their full path, or by their last name."""
    return teacher.count("/") == 1 and not Path(teacher).is_absolute()


def facts_of(folder: Path, name: str) -> CardFacts:
    """What a student's folder tells; the base model's licence and parts are looked up where the base model is."""
    student = StudentConfig.load(str(folder))
    source = str(student.base_model_name_or_path) if student.is_lora else str(folder.resolve())
    config, metrics = pipeline_config(source, revision=student.revision), read_if_there(folder / METRICS_FILE)
    example = TINY_PROMPT if is_tiny(student.teacher or "") else PROMPT
    return CardFacts(
        name=name,
        student=student,
        scheduler=json.loads((folder / "scheduler" / "scheduler_config.json").read_text()),
        license=license_of(student),
        absent=list(absent_components(config)),
        vae_class=config["vae"][1] if student.vae else None,
        prompts=(metrics or {}).get("prompts") or [example],
        pictures=[path.relative_to(folder).as_posix() for path in _numbered(folder / "pictures")],
        comfyui=next((path.relative_to(folder).as_posix() for path in folder.glob("comfyui/*.safetensors")), None),
        samples=(folder / "samples.png").exists(),
        metrics=metrics,
        evaluation=read_if_there(folder / EVALUATION_FILE),
    )


def _numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"), key=lambda path: (len(path.name), path.name))


def license_of(student: StudentConfig) -> dict[str, str]:
    """The base model's licence tags, from its own card; empty if it tells none."""
    teacher = student.teacher
    if is_tiny(teacher or ""):
        return {"license": "apache-2.0"}
    if teacher is None or not (is_on_hub(teacher) or (Path(teacher) / CARD).exists()):
        return {}
    try:
        path = fetch("teacher", teacher, CARD, revision=student.revision) if is_on_hub(teacher) else Path(teacher, CARD)
        data = ModelCard(path.read_text("utf-8"), ignore_metadata_errors=True).data
    except ValueError:  # no card
        return {}
    tags = {tag: data[tag] for tag in LICENSE_TAGS if data.get(tag)}
    link = tags.get("license_link", "")
    if link and "://" not in link and is_on_hub(teacher):  # a file of the base model's repository
        tags["license_link"] = f"https://huggingface.co/{teacher}/blob/main/{link}"
    return tags
