"""What is evaluated: a student, a teacher, or existing pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from ..families import FAMILIES, PromptOptions, load_teacher
from ..pipelines import RdmDistillationPipeline, StudentConfig
from ..tiny import is_tiny
from ..tiny.reference import REFERENCES
from .digests import SAMPLED, digest_of_tensors, digest_of_texts
from .samplers import TEACHER_STEPS, Sampler, solvers_of, student_sampler, teacher_sampler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DRAWING_PACKAGES = ("torch", "diffusers", "transformers", "peft", "pillow")  # their versions affect pictures
Kind = Literal["student", "teacher", "images"]


@dataclass(frozen=True)
class SamplingOptions:
    """What is evaluated, and how it is sampled; None stands for a default of the student or teacher.

    Args:
        kind: what `name` is.
        name: a folder, a Hub id, or a tiny teacher's name; a folder for `images`.
        prompts: as in `load_prompt_set`; None where none are needed.
        num_images: by default one for each prompt, or all existing ones.
        seed: of the first picture; the others have the following ones.
        batch_size: pictures drawn at once by each process.
        num_inference_steps: of a student or a teacher.
        guidance_scale, solver, resolution, max_sequence_length, variant: of a teacher.
        dtype: one of `DTYPES`, of the networks.
        revision: of a Hub repository.
        offload: whether only the working network is on the GPU.
    """

    kind: Kind
    name: str
    prompts: str | None
    num_images: int | None
    seed: int
    batch_size: int
    num_inference_steps: int | None
    guidance_scale: float | None
    solver: str | None
    resolution: int | None
    max_sequence_length: int | None
    variant: str | None
    dtype: str
    revision: str | None
    offload: bool


@dataclass(frozen=True)
class Subject:
    """A student or a teacher, ready to draw.

    Args:
        sampler: draws the pictures.
        record: everything that determines the picture of a given prompt and seed, for JSON.
    """

    sampler: Sampler
    record: Mapping[str, Any]


def load_subject(options: SamplingOptions, device: torch.device) -> Subject:
    """The student or the teacher of the options, on the device.

    Raises:
        ValueError: one sentence, if it cannot be loaded, or cannot be sampled with these options.
    """
    try:
        subject = _load_student(options) if options.kind == "student" else _load_teacher(options)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"The {options.kind} {options.name} cannot be loaded ({reason}).") from error
    put(subject.sampler.pipeline, device, options.offload)
    return subject


def _load_student(options: SamplingOptions) -> Subject:
    name = options.name
    hub = {"revision": options.revision} if options.revision and not Path(name).is_dir() else {}
    pipeline = RdmDistillationPipeline.from_pretrained(name, dtype=DTYPES[options.dtype], **hub)
    sampler = student_sampler(pipeline, options.batch_size, options.num_inference_steps)
    return Subject(sampler, _make_record(options, "rdm", None, sampler))


def _load_teacher(options: SamplingOptions) -> Subject:
    reading = PromptOptions(max_sequence_length=options.max_sequence_length, resolution=options.resolution)
    teacher = load_teacher(options.name, DTYPES[options.dtype], options.revision, options.variant, reading)
    pipeline = teacher.pipeline
    teacher.family.check_options(reading)
    solvers = list(solvers_of(pipeline))
    solver = options.solver or solvers[0]
    if solver not in solvers:
        raise ValueError(f"--solver {solver} does not sample {options.name}; use one of {', '.join(solvers)}.")
    scale = default_guidance(options.name, pipeline) if options.guidance_scale is None else options.guidance_scale
    steps = options.num_inference_steps or TEACHER_STEPS
    sampler = teacher_sampler(pipeline, solver, steps, scale, options.batch_size, **teacher.call_options)
    return Subject(sampler, _make_record(options, solver, scale, sampler))


def tiny_teacher(kind: Kind, name: str, revision: str | None = None) -> str | None:
    """The name of the tiny teacher that is evaluated, or whose student is; None for all others. Loads no weights.

    Raises:
        ValueError: if there is no such student.
    """
    teacher: str | None = name
    if kind == "student":
        hub = {"revision": revision} if revision else {}
        teacher = StudentConfig.load(name, **hub).base_model_name_or_path
    return teacher if kind != "images" and teacher and is_tiny(teacher) else None


def default_guidance(name: str, pipeline: DiffusionPipeline) -> float:
    """The guidance scale of a tiny teacher's reference, or else the stock pipeline's default."""
    if is_tiny(name):
        return REFERENCES[name].guidance_scale
    return FAMILIES[type(pipeline).__name__].default_guidance_scale


def _make_record(options: SamplingOptions, solver: str, scale: float | None, sampler: Sampler) -> dict[str, Any]:
    """Everything that determines a picture; networks are identified by some numbers of each of their tensors."""
    pipeline, name = sampler.pipeline, options.name
    networks = {key: part for key, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    tensors = {f"{key}.{entry}": tensor for key in networks for entry, tensor in networks[key].state_dict().items()}
    grid = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    return {
        "kind": options.kind,
        "name": str(Path(name).resolve()) if Path(name).is_dir() else name,
        "pipeline": next(base.__name__ for base in type(pipeline).__mro__ if base.__name__ in FAMILIES),
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
