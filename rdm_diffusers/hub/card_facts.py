"""What a student's folder tells of it, for its card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..families import FAMILIES, LORA_FILE, absent_components, family_of, pipeline_config
from ..json_files import described
from ..pipelines import StudentConfig
from ..pipelines.lora_file import REMEDY
from ..tiny import is_tiny
from .card_metrics import read_evaluation, read_metrics
from .student_files import is_hub_id, read_scheduler

PROMPT = "a photograph of an astronaut riding a horse"  # where nothing says what the teacher draws
TINY_PROMPT = "a red seven on a blue background"


@dataclass(frozen=True)
class CardFacts:
    """All that a card tells.

    Args:
        name: what the student is loaded by: a folder or a Hub id.
        student: its configuration.
        scheduler: the configuration of its stock scheduler.
        absent: components that the base model, or a full student, was saved without.
        vae_class: the class of the autoencoder, for a student with another one than its base model's.
        prompts: of the pictures, or else one as an example.
        pictures: paths of the student's pictures in the folder, one a prompt.
        comfyui: path of the file for ComfyUI in the folder, if there is one, and ComfyUI can have the base model.
        weights_dtype: of the student's weights in the folder, `float32` for example.
        samples: whether there is a `samples.png`.
        metrics, evaluation: what those files hold, if they are there.
        trained: False for a card that waits for its student.
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
        """The base model by its name; never this machine's path to it."""
        return Path(self.student.teacher or "an unknown teacher").name if self.is_local else str(self.student.teacher)

    @property
    def is_embedded(self) -> bool:
        """Whether the base model is one of this package's own."""
        return is_tiny(self.student.teacher or "")

    @property
    def is_local(self) -> bool:
        """Whether the base model is nothing that the Hub knows."""
        return self.is_embedded or not is_hub_id(self.student.teacher or "")


def facts_of(folder: Path, name: str) -> CardFacts:
    """What a student's folder tells; the base model's parts are looked up where the base model is."""
    student = StudentConfig.load(str(folder))
    family_of({"_class_name": student.pipeline_class})
    source = str(student.base_model_name_or_path) if student.is_lora else str(folder.resolve())
    config, metrics = pipeline_config(source, revision=student.revision), read_metrics(folder)
    embedded = is_tiny(student.teacher or "")
    return CardFacts(
        name=name,
        student=student,
        scheduler=read_scheduler(folder),
        absent=list(absent_components(config)),
        vae_class=config["vae"][1] if student.vae else None,
        prompts=(metrics or {}).get("prompts") or [TINY_PROMPT if embedded else PROMPT],
        pictures=sorted(_relative(folder, "pictures/*.png"), key=lambda path: (len(path), path)),
        comfyui=None if embedded else next(_relative(folder, "comfyui/*.safetensors"), None),
        weights_dtype=_dtype_of(folder, student),
        samples=(folder / "samples.png").exists(),
        metrics=metrics,
        evaluation=read_evaluation(folder),
    )


def _relative(folder: Path, pattern: str) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.glob(pattern))


def _dtype_of(folder: Path, student: StudentConfig) -> str | None:
    """The precision of a student's weights; None where they are not there."""
    where = LORA_FILE if student.is_lora else f"{FAMILIES[student.pipeline_class].denoiser_name}/*.safetensors"
    for path in folder.glob(where):
        try:
            with safe_open(path, "pt") as file:
                return str(file.get_tensor(next(iter(file.keys()))).dtype).removeprefix("torch.")
        except (OSError, SafetensorError, StopIteration) as error:
            raise ValueError(f"{path} is damaged ({described(error)}); {REMEDY}.") from error
    return None
