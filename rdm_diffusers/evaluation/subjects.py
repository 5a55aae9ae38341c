"""What is evaluated: a student, a teacher, or pictures that are there already."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..families import FAMILIES, PromptOptions, load_teacher
from ..pipelines import RdmDistillationPipeline, StudentConfig
from ..tiny import is_tiny
from ..tiny.reference import REFERENCES
from .digests import SAMPLED, digest_of_tensors, digest_of_texts
from .report import TEACHER_STEPS, trained
from .samplers import Sampler, solvers_of, teacher_sampler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DRAWING = ("torch", "diffusers", "transformers", "peft", "pillow")  # packages that move a picture


@dataclass(frozen=True)
class Subject:
    """Something that draws pictures.

    Args:
        sampler: draws them.
        record: all that decides how a picture of given prompt and seed looks, for JSON.
    """

    sampler: Sampler
    record: Mapping[str, Any]


def load_subject(args: argparse.Namespace, device: torch.device) -> Subject:
    """The student or the teacher that the arguments name, on the device.

    Raises:
        ValueError: one sentence, if it cannot be loaded or be sampled so.
    """
    load = _student if args.student else _teacher
    subject = load(args)
    put(subject.sampler.pipeline, device, args.offload)
    return subject


def _student(args: argparse.Namespace) -> Subject:
    name = args.student
    hub = {"revision": args.revision} if args.revision and not Path(name).is_dir() else {}
    try:
        pipeline = RdmDistillationPipeline.from_pretrained(name, dtype=DTYPES[args.dtype], **hub)
    except OSError as error:
        raise ValueError(f"The student {name} cannot be loaded ({str(error).splitlines()[0]}).") from error
    config = trained(pipeline)
    steps = args.num_inference_steps or config.num_inference_steps
    sampler = Sampler(pipeline, steps, False, args.batch_size)
    record = _record("student", name, "rdm", None, sampler, args.dtype)
    return Subject(sampler, record)


def _teacher(args: argparse.Namespace) -> Subject:
    name = args.teacher
    options = PromptOptions(max_sequence_length=args.max_sequence_length, resolution=args.resolution)
    try:
        teacher = load_teacher(name, DTYPES[args.dtype], args.revision, args.variant, options)
    except OSError as error:
        raise ValueError(f"The teacher {name} cannot be loaded ({str(error).splitlines()[0]}).") from error
    pipeline = teacher.pipeline
    teacher.family.check_options(options)
    solvers = list(solvers_of(pipeline))
    solver = args.solver or solvers[0]
    if solver not in solvers:
        raise ValueError(f"--solver {solver} does not sample {name}; use one of {', '.join(solvers)}.")
    scale = usual_guidance(name, pipeline) if args.guidance_scale is None else args.guidance_scale
    steps = args.num_inference_steps or TEACHER_STEPS
    sampler = teacher_sampler(pipeline, solver, steps, scale, args.batch_size, **teacher.call_options)
    record = _record("teacher", name, solver, scale, sampler, args.dtype)
    return Subject(sampler, record)


def tiny_teacher(args: argparse.Namespace) -> str | None:
    """The tiny teacher that is evaluated, or whose student; found without loading weights.

    Raises:
        ValueError: if there is no such student.
    """
    name = args.teacher
    if args.student:
        hub = {"revision": args.revision} if args.revision else {}
        name = StudentConfig.load(args.student, **hub).base_model_name_or_path
    return name if name and is_tiny(name) else None


def usual_guidance(name: str, pipeline: DiffusionPipeline) -> float:
    """The tiny teachers' guidance in their references, else the stock pipeline's own default."""
    if is_tiny(name):
        return REFERENCES[name].guidance_scale
    return FAMILIES[type(pipeline).__name__].default_guidance_scale


def _record(
    kind: str,
    name: str,
    solver: str,
    guidance_scale: float | None,
    sampler: Sampler,
    dtype: str,
) -> dict[str, Any]:
    """What decides a picture; networks are told apart by some numbers of each of their tensors."""
    pipeline = sampler.pipeline
    networks = {key: part for key, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    tensors = {f"{key}.{entry}": tensor for key in networks for entry, tensor in networks[key].state_dict().items()}
    grid = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    return {
        "kind": kind,
        "name": str(Path(name).resolve()) if Path(name).is_dir() else name,
        "pipeline": next(base.__name__ for base in type(pipeline).__mro__ if base.__name__ in FAMILIES),
        "weights_sha256": digest_of_tensors(tensors, SAMPLED),
        "scheduler_sha256": digest_of_texts([type(pipeline.scheduler).__name__, json.dumps(grid, sort_keys=True)]),
        "sampler": solver,
        "num_inference_steps": sampler.steps,
        "nfe": sampler.nfe,
        "guidance_scale": guidance_scale,
        "call_options": dict(sampler.call_options),
        "dtype": dtype,
        "versions": versions(DRAWING),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def put(pipeline: DiffusionPipeline, device: torch.device, offload: bool) -> None:
    """Puts a pipeline on the device, or with `offload` only what is at work; a CPU has nothing to offload from."""
    if offload and device.type != "cpu":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
