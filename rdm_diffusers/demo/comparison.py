"""A student and its teacher, loaded once, which draw the same prompts from the same seed.

The teacher uses the student's text encoders and autoencoder. Under a LoRA student it is also the same denoiser, with
the LoRA switched off, so that both need the memory of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image

from ..evaluation.pictures import to_pil
from ..evaluation.subjects import TEACHER_STEPS, Sampler, solvers_of, student_sampler, teacher_options, teacher_sampler
from ..families import FAMILIES, Family, Lora, load_scheduler, load_teacher, pipeline_config, rebuilt
from ..pipelines import RdmDistillationPipeline, StudentConfig
from ..tiny import is_tiny
from ..tiny.reference import REFERENCES
from .inputs import MOST_GUIDANCE

SMALL = 128  # pixels a side: several pictures up to this size are drawn at once
TOGETHER = 16  # of them
MOST_STUDENT_STEPS = 8


@dataclass(frozen=True)
class Drawing:
    """What one network drew.

    Args:
        pictures: one for each prompt.
        calls: network calls for one picture, guidance included.
        seconds: for one picture, decoding included.
    """

    pictures: Sequence[Image.Image]
    calls: int
    seconds: float


class Comparison:
    """A student and, if it is loaded, its teacher. Only one of them draws at a time, whoever asks.

    Args:
        pipeline: the student.
        teacher: the teacher's stock pipeline, or None.
        as_teacher: a context in which networks that both share compute as the teacher's.
    """

    def __init__(
        self,
        pipeline: RdmDistillationPipeline,
        teacher: DiffusionPipeline | None = None,
        as_teacher: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        assert pipeline.student is not None
        self.student: StudentConfig = pipeline.student
        self.family: Family = FAMILIES[self.student.pipeline_class]
        self._pipeline, self._teacher, self._as_teacher = pipeline, teacher, as_teacher
        self._options = teacher_options(pipeline)
        self._lock, self._batch_size = Lock(), 1

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher is there too."""
        return self._teacher is not None

    @property
    def student_steps(self) -> int:
        """The trained number of the student's steps."""
        return self.student.num_inference_steps

    @property
    def most_student_steps(self) -> int:
        """The highest number of steps that is offered; its scheduler has a grid for every number."""
        return max(self.student_steps, MOST_STUDENT_STEPS)

    @property
    def teacher_steps(self) -> int:
        """The teacher's usual number of steps."""
        return TEACHER_STEPS

    @property
    def guidance_scale(self) -> float:
        """The guidance that the teacher was sampled with beside its student, or else its usual one."""
        recorded, teacher = self.student.arguments.get("sample_guidance_scale"), self.student.teacher or ""
        if isinstance(recorded, int | float) and 0 <= recorded <= MOST_GUIDANCE:
            return float(recorded)
        return REFERENCES[teacher].guidance_scale if is_tiny(teacher) else self.family.default_guidance_scale

    def to(self, device: torch.device) -> None:
        """Moves all networks to a device."""
        for pipeline in filter(None, (self._pipeline, self._teacher)):
            pipeline.to(device)

    def warm_up(self) -> None:
        """Draws a picture of each, because the first one takes longer; also shows whether they can be drawn."""
        (picture,) = self.draw_student([""], 0, self.student_steps).pictures
        self._batch_size = TOGETHER if max(picture.size) <= SMALL else 1
        if self.has_teacher:
            self.draw_teacher([""], 0, 2, self.guidance_scale)

    def draw_student(self, prompts: Sequence[str], seed: int, steps: int) -> Drawing:
        """One picture of each prompt, all from one seed."""
        return self._draw(student_sampler(self._pipeline, self._batch_size, steps), prompts, seed, nullcontext)

    def draw_teacher(self, prompts: Sequence[str], seed: int, steps: int, guidance_scale: float) -> Drawing:
        """The same of the teacher, guided with w in u + w (c - u); at most 1 is off."""
        assert self._teacher is not None
        solver = next(iter(solvers_of(self._teacher)))
        sampler = teacher_sampler(self._teacher, solver, steps, guidance_scale, self._batch_size, **self._options)
        return self._draw(sampler, prompts, seed, self._as_teacher)

    def _draw(
        self, sampler: Sampler, prompts: Sequence[str], seed: int, networks: Callable[[], AbstractContextManager[None]]
    ) -> Drawing:
        with self._lock, networks():
            images, seconds = sampler(prompts, [seed] * len(prompts))
        return Drawing([to_pil(image) for image in images], sampler.nfe, seconds)


def load_comparison(
    name: str, dtype: torch.dtype, device: torch.device, with_teacher: bool = True, revision: str | None = None
) -> Comparison:
    """Loads a student, and its teacher beside it.

    Args:
        name: a folder or a Hub id.
        dtype: of all networks.
        device: where they draw.
        with_teacher: whether the teacher is wanted.
        revision: of a student on the Hub.

    Raises:
        ValueError, ImportError: one sentence, if one of them cannot be loaded.
    """
    hub = {"revision": revision} if revision and not Path(name).is_dir() else {}
    pipeline = RdmDistillationPipeline.from_pretrained(name, dtype=dtype, **hub)
    comparison = _beside_teacher(pipeline, name, dtype) if with_teacher else Comparison(pipeline)
    comparison.to(device)
    return comparison


def _beside_teacher(pipeline: RdmDistillationPipeline, name: str, dtype: torch.dtype) -> Comparison:
    student = pipeline.student
    assert student is not None
    family = FAMILIES[student.pipeline_class]
    denoiser = family.denoiser(pipeline)
    if _is_base_the_teacher(student):
        base, hub = str(student.base_model_name_or_path), {"revision": student.revision}
        scheduler = load_scheduler("teacher", base, pipeline_config(base, **hub), **hub)
        teacher = rebuilt(family.pipeline_class, pipeline, scheduler=scheduler)
        return Comparison(pipeline, teacher, lambda: _without_lora(denoiser))
    own = _load_own_teacher(student, name, dtype)
    parts = {"scheduler": own.scheduler, family.denoiser_name: family.denoiser(own)}
    return Comparison(pipeline, rebuilt(family.pipeline_class, pipeline, **parts))


def _is_base_the_teacher(student: StudentConfig) -> bool:
    """Whether a LoRA student's base, without the LoRA, is its teacher; LoRAs of the teacher may be in the student."""
    return student.is_lora and (bool(student.base_loras) or not student.arguments.get("teacher_lora"))


@contextmanager
def _without_lora(denoiser: ModelMixin) -> Iterator[None]:
    """Switches the student's LoRA off, and on again whatever happens."""
    denoiser.disable_lora()
    try:
        yield
    finally:
        denoiser.enable_lora()


def _load_own_teacher(student: StudentConfig, name: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The teacher of a full student, or one with LoRAs that are in its student, too."""
    teacher, arguments = student.teacher or "", student.arguments
    loras = arguments.get("teacher_lora") or []
    # Of folders that others do not have, a student records the last name alone.
    if not all("/" in each for each in loras) or not (student.is_lora or is_tiny(teacher) or "/" in teacher):
        raise ValueError(f"{name} does not say where its teacher is; show the student alone with --no_teacher.")
    known: dict[str, Any] = {"revision": student.revision, "variant": student.variant}
    if not student.is_lora:
        known = {key: value for key in known if isinstance(value := arguments.get(key), str)}
    return load_teacher(teacher, dtype, **known, loras=[Lora.parse(each) for each in loras]).pipeline
