"""What is evaluated: the options of an evaluation, and students and teachers as samplers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from torch import Tensor

from ..families import FAMILIES, PromptOptions, load_teacher, on_white, rebuilt
from ..pipelines import RdmDistillationPipeline, StudentConfig
from ..tiny import is_tiny
from ..tiny.reference import REFERENCES
from .records import SAMPLED, digest_of_tensors, digest_of_texts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DRAWING_PACKAGES = ("torch", "diffusers", "transformers", "peft", "pillow")  # their versions affect pictures
TEACHER_STEPS = 50
READING = ("max_sequence_length", "height", "width", "use_resolution_binning")  # options for reading prompts and sizes


@dataclass(frozen=True)
class Options:
    """The flags of `rdm-evaluate`, whose help explains them, with the defaults filled in.

    Exactly one of `student`, `teacher` and `images` is given. None stands for a default of the student or teacher.
    `tiny` is no flag, but the name of the tiny teacher that is evaluated, or whose student is; None for all others.
    """

    student: str | None
    teacher: str | None
    images: str | None
    prompts: str | None
    num_images: int | None
    seed: int
    output_dir: str
    batch_size: int
    num_inference_steps: int | None
    guidance_scale: float | None
    solver: str | None
    dtype: str
    resolution: str | None
    max_sequence_length: int | None
    revision: str | None
    variant: str | None
    single_file_config: str | None
    offload: bool
    reference_data: str | None
    reference_teacher: str | None
    features: str
    feature_weights: str | None
    reward: Sequence[str]
    reward_dtype: str
    tiny: str | None

    @property
    def name(self) -> str:
        """Of the student, the teacher, or the folder of pictures."""
        return self.student or self.teacher or self.images or ""


Solver = Callable[[SchedulerMixin, int], SchedulerMixin]  # the teacher's own scheduler, steps -> the solver


def _flow_dpm_solver(own: SchedulerMixin, steps: int) -> SchedulerMixin:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": _shift(own)}
    return DPMSolverMultistepScheduler.from_config(own.config, **flow)


def _euler(own: SchedulerMixin, steps: int) -> SchedulerMixin:
    return FlowMatchEulerDiscreteScheduler.from_config(own.config, shift=_shift(own))


def _trailing_euler(own: SchedulerMixin, steps: int) -> SchedulerMixin:
    """The last step starts at sigma = 1/K, shifted; the default grid wastes it on a sigma of nearly 0."""
    if own.config.get("use_dynamic_shifting") or steps == 1:  # the pipeline sets the grid
        return _euler(own, steps)
    last = _shift(own) / (steps + _shift(own) - 1)
    return FlowMatchEulerDiscreteScheduler.from_config(own.config, shift=_shift(own), shift_terminal=last)


def _shift(own: SchedulerMixin) -> float:
    return own.config.get("shift", own.config.get("flow_shift", 1.0))


# The first of each is the default, for many steps; samples.png shows the last one at few steps.
TEACHER_SOLVERS: dict[str, Solver] = {
    "ddim": lambda own, steps: DDIMScheduler.from_config(own.config),
    "dpm-solver++": lambda own, steps: DPMSolverMultistepScheduler.from_config(own.config),
}
FLOW_SOLVERS: dict[str, Solver] = {
    "euler": _euler,
    "dpm-solver++": _flow_dpm_solver,
    "euler-trailing": _trailing_euler,
}


@dataclass
class Sampler:
    """A pipeline with its settings.

    Args:
        pipeline: any text-to-image pipeline.
        steps: sampling steps.
        guided: whether a step takes two network calls, one of them without the prompt.
        batch_size: pictures drawn at once; a picture depends on its prompt and seed only, for which some families'
            pictures are drawn one by one.
        call_options: further arguments of the pipeline, for example `max_sequence_length`.
    """

    pipeline: DiffusionPipeline
    steps: int
    guided: bool
    batch_size: int = 250
    call_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nfe(self) -> int:
        """Network calls for one picture, guidance included."""
        return self.steps * (2 if self.guided else 1)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, float]:
        """Draws one picture per prompt and seed.

        Returns:
            Images `[N, 3, H, W]` in [0, 1], float32, on the CPU, and the average seconds for one.
        """
        self.pipeline.set_progress_bar_config(disable=True)
        started, parts = time.perf_counter(), []
        size = 1 if FAMILIES[stock_name(self.pipeline)].mixes_prompts else self.batch_size
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            output = self.pipeline(
                prompt=list(prompts[part]),
                num_inference_steps=self.steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                output_type="pt",
                **self.call_options,
            )
            parts.append(on_white(output.images.float().cpu()))
        return torch.cat(parts), (time.perf_counter() - started) / len(prompts)


def solvers_of(pipeline: DiffusionPipeline) -> dict[str, Solver]:
    """The solvers that sample this teacher: `TEACHER_SOLVERS`, or for flow matching `FLOW_SOLVERS`."""
    family = FAMILIES[type(pipeline).__name__]
    return FLOW_SOLVERS if family.prediction_type(pipeline.scheduler) == "flow_prediction" else TEACHER_SOLVERS


def teacher_sampler(
    pipeline: DiffusionPipeline,
    solver: str,
    steps: int,
    guidance_scale: float,
    batch_size: int = 250,
    **call_options: Any,
) -> Sampler:
    """The teacher with one of its `solvers_of`, on a copy of the pipeline that shares its networks."""
    family = FAMILIES[type(pipeline).__name__]
    copy = rebuilt(type(pipeline), pipeline, scheduler=solvers_of(pipeline)[solver](pipeline.scheduler, steps))
    calls_twice = guidance_scale > 1 and not family.embeds_guidance(pipeline)
    return Sampler(copy, steps, calls_twice, batch_size, {**family.guided(guidance_scale), **call_options})


def student_settings(student: RdmDistillationPipeline) -> StudentConfig:
    """The settings that a student was trained with; ValueError for a pipeline without a student."""
    if student.student is None:
        raise ValueError(f"This {type(student).__name__} holds no student; load one with from_pretrained.")
    return student.student


def student_sampler(
    student: RdmDistillationPipeline, batch_size: int = 250, steps: int | None = None, **call_options: Any
) -> Sampler:
    """The student with its trained settings, or with another number of steps or other options of the call."""
    return Sampler(student, steps or student_settings(student).num_inference_steps, False, batch_size, call_options)


def teacher_options(student: RdmDistillationPipeline) -> dict[str, Any]:
    """The options with which the student's teacher reads prompts as the student does."""
    return {key: value for key, value in student_settings(student).call_arguments.items() if key in READING}


def load_subject(options: Options, device: torch.device) -> tuple[Sampler, dict[str, Any]]:
    """The student or the teacher of the options on the device, and all that determines a picture of it, for JSON.

    Raises:
        ValueError: one sentence, if it cannot be loaded, or cannot be sampled with these options.
    """
    try:
        sampler, solver, scale = _load_student(options) if options.student else _load_teacher(options)
    except OSError as error:
        kind, reason = "student" if options.student else "teacher", str(error).splitlines()[0]
        raise ValueError(f"The {kind} {options.name} cannot be loaded ({reason}).") from error
    record = _make_record(options, solver, scale, sampler)
    put(sampler.pipeline, device, options.offload)
    return sampler, record


def _load_student(options: Options) -> tuple[Sampler, str, None]:
    hub = {"revision": options.revision} if options.revision and not Path(options.name).is_dir() else {}
    pipeline = RdmDistillationPipeline.from_pretrained(options.name, dtype=DTYPES[options.dtype], **hub)
    family, size = FAMILIES[student_settings(pipeline).pipeline_class], options.resolution
    family.latent_shape(pipeline, size)  # raises for a size that it cannot draw
    call = family.call_options(PromptOptions(resolution=size))
    return student_sampler(pipeline, options.batch_size, options.num_inference_steps, **call), "rdm", None


def _load_teacher(options: Options) -> tuple[Sampler, str, float]:
    name, scale, steps = options.name, options.guidance_scale, options.num_inference_steps or TEACHER_STEPS
    reading = PromptOptions(max_sequence_length=options.max_sequence_length, resolution=options.resolution)
    place: dict[str, Any] = {
        "revision": options.revision,
        "variant": options.variant,
        "single_file_config": options.single_file_config,
    }
    teacher = load_teacher(name, DTYPES[options.dtype], options=reading, **place)
    teacher.family.check_options(reading)
    teacher.family.latent_shape(teacher.pipeline, reading.resolution)  # raises for a size that it cannot draw
    solvers = list(solvers_of(teacher.pipeline))
    solver = options.solver or solvers[0]
    if solver not in solvers:
        raise ValueError(f"--solver {solver} does not sample {name}; use one of {', '.join(solvers)}.")
    if scale is None:
        scale = REFERENCES[name].guidance_scale if is_tiny(name) else teacher.family.default_guidance_scale
    sampler = teacher_sampler(teacher.pipeline, solver, steps, scale, options.batch_size, **teacher.call_options)
    return sampler, solver, scale


def _make_record(options: Options, solver: str, scale: float | None, sampler: Sampler) -> dict[str, Any]:
    """Networks are identified by some numbers of each of their tensors."""
    pipeline, name = sampler.pipeline, options.name
    networks = {key: part for key, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    tensors = {f"{key}.{entry}": tensor for key in networks for entry, tensor in networks[key].state_dict().items()}
    grid = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    return {
        "kind": "student" if options.student else "teacher",
        "name": str(Path(name).resolve()) if Path(name).is_dir() else name,
        "pipeline": stock_name(pipeline),
        "weights_sha256": digest_of_tensors(tensors, SAMPLED),
        "scheduler_sha256": digest_of_texts([type(pipeline.scheduler).__name__, json.dumps(grid, sort_keys=True)]),
        "sampler": solver,
        "num_inference_steps": sampler.steps,
        "nfe": sampler.nfe,
        "guidance_scale": scale,
        "call_options": dict(sampler.call_options),
        "dtype": options.dtype,
        "versions": installed_versions(DRAWING_PACKAGES),
    }


def stock_name(pipeline: DiffusionPipeline) -> str:
    """The name of the stock class that a pipeline is an instance of."""
    return next(base.__name__ for base in type(pipeline).__mro__ if base.__name__ in FAMILIES)


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    versions = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def put(pipeline: DiffusionPipeline, device: torch.device, offload: bool) -> None:
    """Puts a pipeline on the device; with `offload` on a GPU, only the working network."""
    if offload and device.type != "cpu":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
