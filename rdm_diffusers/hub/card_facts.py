"""What a model card states about a student, read from the student's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..families import FAMILIES, LORA_FILE, absent_components, family_of, pipeline_config
from ..pipelines import StudentConfig
from ..pipelines.student_config import REMEDY
from ..tiny import is_tiny
from ..untrusted import described
from .card_metrics import EVALUATION_FILE, METRICS_FILE, read_record
from .student_files import is_hub_id, read_scheduler

PROMPT = "a photograph of an astronaut riding a horse"  # if no prompts are recorded
TINY_PROMPT = "a red seven on a blue background"


@dataclass(frozen=True)
class CardFacts:
    """What a card states.

    Args:
        name: the folder or Hub id that readers load the student by.
        student: its configuration.
        scheduler: the configuration of its stock scheduler.
        absent: components that the base model, or a full student, was saved without.
        vae_class: the autoencoder's class, if the student has another autoencoder than its base model.
        prompts: of the pictures; without pictures one example.
        pictures: their paths in the folder, one for each prompt.
        comfyui: path of the file for ComfyUI in the folder, if there is one and ComfyUI can load the base model.
        weights_dtype: of the student's weights in the folder, for example `float32`.
        samples: whether there is a `samples.png`.
        metrics, evaluation: the contents of these files, if they exist.
        trained: False for a card that is written before the training.
    """

    name: str
    student: StudentConfig
    scheduler: Mapping[str, Any]
    absent: Sequence[str] = ()
    vae_class: str | None = None
    prompts: Sequence[str] = (PROMPT,)
    pictures: Sequence[str] = ()
    comfyui: str | None = None
    weights_dtype: str | None = None
    samples: bool = False
    metrics: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    trained: bool = True

    @property
    def teacher(self) -> str:
        """The base model's name, never its local path."""
        return Path(self.student.teacher or "an unknown teacher").name if self.is_local else str(self.student.teacher)

    @property
    def is_embedded(self) -> bool:
        """Whether this package includes the base model."""
        return is_tiny(self.student.teacher or "")

    @property
    def is_local(self) -> bool:
        """Whether the base model is not on the Hub."""
        return self.is_embedded or not is_hub_id(self.student.teacher or "")


def facts_of(folder: Path, name: str) -> CardFacts:
    """The facts about a student in a folder; those about its base model are read from the base model."""
    student = StudentConfig.load(str(folder))
    family_of({"_class_name": student.pipeline_class})
    source = str(student.base_model_name_or_path) if student.is_lora else str(folder.resolve())
    config, metrics = pipeline_config(source, revision=student.revision), read_record(folder / METRICS_FILE)
    embedded = is_tiny(student.teacher or "")
    return CardFacts(
        name=name,
        student=student,
        scheduler=read_scheduler(folder),
        absent=list(absent_components(config)),
        vae_class=config["vae"][1] if student.vae else None,
        prompts=(metrics or {}).get("prompts") or [TINY_PROMPT if embedded else PROMPT],
        pictures=sorted(_paths(folder, "pictures/*.png"), key=lambda path: (len(path), path)),
        comfyui=None if embedded else next(_paths(folder, "comfyui/*.safetensors"), None),
        weights_dtype=_dtype_of(folder, student),
        samples=(folder / "samples.png").exists(),
        metrics=metrics,
        evaluation=read_record(folder / EVALUATION_FILE),
    )


def _paths(folder: Path, pattern: str) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.glob(pattern))


def _dtype_of(folder: Path, student: StudentConfig) -> str | None:
    """The dtype of a student's weights; None without weights."""
    pattern = LORA_FILE if student.is_lora else f"{FAMILIES[student.pipeline_class].denoiser_name}/*.safetensors"
    for path in folder.glob(pattern):
        try:
            with safe_open(path, "pt") as file:
                return str(file.get_tensor(next(iter(file.keys()))).dtype).removeprefix("torch.")
        except (OSError, SafetensorError, StopIteration) as error:
            raise ValueError(f"{path} is damaged ({described(error)}); {REMEDY}.") from error
    return None
