"""`RdmDistillationPipeline`: loads any student and samples it, without imports from `training/`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)
from diffusers.utils import logging

from ..families import (
    FAMILIES,
    INDEX,
    LORA_FILE,
    check_pipeline,
    explain_hub_errors,
    fetch,
    load_options,
    load_scheduler,
    load_vae,
    pipeline_config,
    rebuilt,
    rest_of,
    teacher_config,
)
from ..schedulers import RdmScheduler
from ..sizes import in_words, resolution_of
from ..tiny import resolve_teacher
from .bases import add_loras, check_noise_schedule, load_file_parts, shown
from .lora_file import check_lora_file
from .saving import remove_origins, stock_scheduler, without_adapters
from .student_config import StudentConfig, is_student

logger = logging.get_logger(__name__)
CLASSES: dict[str, type[RdmDistillationPipeline]] = {}
# The call's arguments that default to the student's.
TRAINED = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "max_sequence_length")
PUSH_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr")
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


class RdmDistillationPipeline(DiffusionPipeline):
    """A few-step student: its stock pipeline, but with the trained number of steps and with guidance off by default.

    `from_pretrained` of this class returns one of its subclasses, such as `RdmStableDiffusionPipeline`, each also an
    instance of its stock pipeline. Saved folders name stock classes only, so stock diffusers loads them too.

    A student is trained without guidance; a call may still ask for it (`guidance_scale` above 1), at twice the cost.
    Without guidance a negative prompt has no effect, and a warning says so.
    """

    _student: StudentConfig | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Registers a subclass under the name of its stock pipeline, its second base."""
        super().__init_subclass__(**kwargs)
        stock = cls.__bases__[1]
        cls.__call__ = _few_step_call(stock)
        CLASSES[stock.__name__] = cls
        _register_for_auto_pipelines(cls, stock)

    @property
    def student(self) -> StudentConfig | None:
        """How it is sampled by default; None for a pipeline without a student.

        Pipelines that share a scheduler, as diffusers' AutoPipelines do, share the student.
        """
        return self._student or getattr(getattr(self, "scheduler", None), "student", None)

    @student.setter
    def student(self, student: StudentConfig | None) -> None:
        self._student = student

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> RdmDistillationPipeline:
        """Loads a student from a folder or a Hub repository.

        The subclasses also load folders of their stock pipeline, and are then called as it.

        Args:
            pretrained_model_name_or_path: a LoRA student, whose teacher is loaded automatically, or a full one.
            kwargs: as in diffusers; `dtype` or `torch_dtype` (float32 by default), `revision`, `token`, and so on.

        Raises:
            ValueError: if it is no student, of an unsupported family, or made by a newer release, or if it or its
                teacher cannot be downloaded.
        """
        name = str(pretrained_model_name_or_path)
        if cls is not RdmDistillationPipeline and (Path(name) / INDEX).exists() and not is_student(name):
            return super().from_pretrained(name, **kwargs)
        student = StudentConfig.load(name, **{key: kwargs[key] for key in HUB_OPTIONS if key in kwargs})
        if student.pipeline_class not in CLASSES:
            raise ValueError(
                f"Students of {student.pipeline_class} are not supported; supported: {', '.join(CLASSES)}."
            )
        return CLASSES[student.pipeline_class]._load(name, student, kwargs)._as(student)

    @classmethod
    def from_lora(cls, base: str | Path, lora: str | Path, **kwargs: Any) -> RdmDistillationPipeline:
        """Loads a LoRA student on another base model than its teacher, for example on a fine-tune of it.

        Args:
            base: a folder, a Hub id or a single file, of the teacher's family.
            lora: the student's folder or Hub id.
            kwargs: as in `from_pretrained`; the Hub's options apply to the student. For a single file `config`, the
                folder or Hub id with its configuration, as in diffusers' `from_single_file`.

        Raises:
            ValueError: if `lora` is no LoRA student, or `base` of another family, prediction type or noise schedule.
        """
        hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        student = StudentConfig.load(str(lora), **hub)
        if not student.is_lora:
            raise ValueError(f"{lora} is a full student, which stands alone; load it with from_pretrained.")
        file, _, index = teacher_config(str(base), kwargs.pop("config", None), **{**hub, "revision": None})
        base_class = index["_class_name"]
        if base_class != student.pipeline_class:
            raise ValueError(f"{lora} is a student of a {student.pipeline_class}, and {base} is a {base_class}.")
        student = replace(student, base_model_name_or_path=str(base), revision=None, variant=None, base_file=None)
        if file:
            student = replace(student, base_file={"config": file.config, "sha256": "", "parts": []})
        return CLASSES[student.pipeline_class]._load(str(lora), student, kwargs)._as(student)

    @classmethod
    def from_pipe(
        cls, pipeline: DiffusionPipeline, student: str | Path | None = None, **kwargs: Any
    ) -> RdmDistillationPipeline:
        """A few-step pipeline that shares the components of another one.

        Args:
            pipeline: a few-step pipeline, or a stock one into which the student's LoRA is loaded.
            student: the folder or Hub id of a LoRA student, for stock pipelines.
            kwargs: components to replace, and the Hub's options.

        Raises:
            ValueError: if a stock pipeline is given without a student, or with one of another family, prediction type
                or noise schedule.
        """
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        config = getattr(pipeline, "student", None) if student is None else StudentConfig.load(str(student), **hub)
        if config is None and cls is not RdmDistillationPipeline:
            return super().from_pipe(pipeline, **kwargs)
        if config is None:
            raise ValueError("A stock pipeline has no student; give its folder or Hub id as `student`.")
        target = CLASSES[config.pipeline_class]
        if not isinstance(pipeline, target.__bases__[1]):
            kind = type(pipeline).__name__
            raise ValueError(f"{student} is a student of a {config.pipeline_class}, and the pipeline is a {kind}.")
        shared = rebuilt(target, pipeline, **kwargs)
        if student is not None:
            check_noise_schedule(config, "the pipeline", shared.scheduler)
            if config.base_loras:
                logger.warning("The pipeline must have %s, on which the student was trained.", shown(config.loras))
            shared._add_lora(str(student), config, hub)
        return shared._as(config)

    def _as(self, student: StudentConfig) -> RdmDistillationPipeline:
        """This pipeline, sampling as the student was trained."""
        self.scheduler = RdmScheduler.from_config(student.scheduler)
        self.student = self.scheduler.student = student
        return self

    @classmethod
    def _load(cls, name: str, student: StudentConfig, kwargs: dict[str, Any]) -> RdmDistillationPipeline:
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        if not student.is_lora:
            # Resolved, because a student's folder may have the name of an embedded teacher.
            folder = str(Path(name).resolve()) if Path(name).is_dir() else name
            return cls._load_stock("student", folder, hub, kwargs)
        base, base_hub = student.base_configuration, {**hub, "revision": student.revision}
        options: dict[str, Any] = {"variant": student.variant, **kwargs}
        config = pipeline_config(base, **base_hub)
        check_noise_schedule(student, base, load_scheduler("teacher", base, config, **base_hub))
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype", torch.float32))
        if student.vae is not None and "vae" not in kwargs:
            options["vae"] = load_vae(student.vae, config, dtype, **{**hub, "revision": None})
        options |= load_file_parts(student, config, dtype, options.keys(), **base_hub)
        if student.file:
            base = rest_of(student.file, config, options.keys(), **base_hub)
        pipeline = cls._load_stock("teacher", base, base_hub, options)
        add_loras(pipeline, student, {**hub, "revision": None})
        pipeline._add_lora(name, student, hub)
        return pipeline

    def _add_lora(self, name: str, student: StudentConfig, hub: dict[str, Any]) -> None:
        """Checks the LoRA in a student's folder or Hub repository, then loads it."""
        folder = Path(name)
        path = folder / LORA_FILE if folder.is_dir() else fetch("student", name, LORA_FILE, **hub)
        check_lora_file(path, FAMILIES[student.pipeline_class].denoiser_name, student.weights_sha256)
        with explain_hub_errors("student", name, hub.get("revision")):
            self.load_lora_weights(name, weight_name=LORA_FILE, use_safetensors=True, **hub)

    @classmethod
    def _load_stock(cls, what: str, name: str, hub: dict[str, Any], options: dict[str, Any]) -> RdmDistillationPipeline:
        """A pipeline of this class, loaded as stock diffusers does, but in float32 by default."""
        dtype = {} if "torch_dtype" in options else {"dtype": torch.float32}
        config = pipeline_config(name, **hub)
        check_pipeline(what, name, config, options.keys(), variant=options.get("variant"), **hub)
        options = {**load_options(config), **dtype, **options}
        with explain_hub_errors(what, name, hub.get("revision")):
            return super().from_pretrained(resolve_teacher(name), **hub, **options)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves a full student as a stock folder with an `rdm_config.json`; active adapters are fused into the copy.

        `kwargs` are those of diffusers, `push_to_hub` and `repo_id` included.
        """
        family, student = FAMILIES[type(self).__bases__[1].__name__], self.student
        parts = without_adapters(self)
        if student is None:
            parts["scheduler"] = stock_scheduler(self.scheduler, family)
            rebuilt(family.pipeline_class, self, **parts).save_pretrained(save_directory, **kwargs)
            return
        parts["scheduler"] = stock_scheduler(RdmScheduler.from_config(student.scheduler), family, self.scheduler)
        stock = rebuilt(family.pipeline_class, self, **parts)
        folder, push = Path(save_directory), kwargs.pop("push_to_hub", False)
        hub = {key: kwargs.pop(key) for key in PUSH_OPTIONS if key in kwargs}
        stock.save_pretrained(folder, **kwargs)
        remove_origins(folder)
        nothing: dict[str, Any] = {
            "base_model_name_or_path": None,
            "revision": None,
            "variant": None,
            "vae": None,
            "base_file": None,
        }
        alone = replace(student, **nothing, base_loras=[])
        alone.save(folder)
        if push:
            self.push_to_hub(hub.pop("repo_id", folder.resolve().name), **hub)


@contextmanager
def _draws_from(scheduler: SchedulerMixin, generator: torch.Generator | list[torch.Generator] | None) -> Iterator[None]:
    """Makes `scheduler.step` draw from `generator` by default; stock flow pipelines pass it none."""
    if generator is None or "generator" not in inspect.signature(scheduler.step).parameters:
        yield
        return
    scheduler.step = partial(scheduler.step, generator=generator)
    try:
        yield
    finally:
        del scheduler.step  # the class's method shows again


def _few_step_call(stock: type[DiffusionPipeline]) -> Callable:
    """The stock pipeline's `__call__`, with the student's settings as defaults and `generator` for every draw."""
    signature = inspect.signature(stock.__call__)
    trained = [name for name in TRAINED if name in signature.parameters]

    @wraps(stock.__call__)
    def __call__(self, *args, **kwargs):  # noqa: N807 - becomes the class's
        call, student = signature.bind_partial(self, *args, **kwargs), self.student
        guided = any((call.arguments.get(name) or 0) > 1 for name in ("guidance_scale", "true_cfg_scale"))
        if student and call.arguments.get("negative_prompt") and not guided:
            logger.warning("A student is sampled without guidance, so that its negative prompt has no effect.")
        given = {name: value for name, value in call.arguments.items() if name not in trained or value is not None}
        own = {"num_inference_steps": student.num_inference_steps, **student.call_arguments} if student else {}
        call.arguments = own | given
        _warn_of_size(student, call.arguments)
        with _draws_from(self.scheduler, call.arguments.get("generator")):
            return stock.__call__(*call.args, **call.kwargs)

    defaults = [
        parameter.replace(default=None) if name in trained else parameter
        for name, parameter in signature.parameters.items()
    ]
    setattr(__call__, "__signature__", signature.replace(parameters=defaults))  # noqa: B010 - functions have no such field
    return __call__


def _warn_of_size(student: StudentConfig | None, call: Mapping[str, Any]) -> None:
    """Warns of a size that a student was not trained at, if its sizes are known."""
    if student and student.sizes and call.get("height") and call.get("width"):
        size = in_words(resolution_of(call["height"], call["width"]))
        if size not in student.sizes:
            known = ", ".join(student.sizes)
            logger.warning("The student was trained at %s pixels; pictures of %s may be worse.", known, size)


def _register_for_auto_pipelines(pipeline_class: type[DiffusionPipeline], stock: type[DiffusionPipeline]) -> None:
    """Lets diffusers' AutoPipelines accept a few-step pipeline; for other tasks than text to image it becomes stock."""
    key = next((key for key, each in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items() if each is stock), None)
    if key is not None:
        AUTO_TEXT2IMAGE_PIPELINES_MAPPING[f"rdm-{key}"] = pipeline_class
        for mapping in (AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, AUTO_INPAINT_PIPELINES_MAPPING):
            if key in mapping:
                mapping[f"rdm-{key}"] = mapping[key]
