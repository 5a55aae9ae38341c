"""The end of a run: the student beside its teacher, as pictures, as `metrics.json`, and as a table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..folders import write_whole
from ..pipelines import RdmDistillationPipeline, StudentConfig
from ..tiny import TINY_NAME
from ..tiny.reference import load_quality
from .metrics import Metrics, measure
from .pictures import labelled_rows, to_pil
from .samplers import Sampler, solvers_of, teacher_sampler

TEACHER_STEPS = 50
READING = ("max_sequence_length", "height", "width", "use_resolution_binning")
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "huggingface_hub", "safetensors")


def trained(student: RdmDistillationPipeline) -> StudentConfig:
    """How a student was trained to be sampled.

    Raises:
        ValueError: for a pipeline that is no student.
    """
    if student.student is None:
        raise ValueError(f"This {type(student).__name__} is no student; load one with from_pretrained.")
    return student.student


def student_sampler(student: RdmDistillationPipeline, batch_size: int = 250) -> Sampler:
    """The student with its trained settings."""
    return Sampler(student, trained(student).num_inference_steps, False, batch_size)


def teacher_options(student: RdmDistillationPipeline) -> dict[str, Any]:
    """What the student's teacher must be called with to read prompts as the student does."""
    return {key: value for key, value in trained(student).call_arguments.items() if key in READING}


def best_few_step_teacher(
    teacher: DiffusionPipeline,
    steps: int,
    guidance_scale: float,
    num_images: int,
    name: str = TINY_NAME,
    **call_options: Any,
) -> Metrics:
    """The teacher at the student's number of steps, with whichever solver comes closer to its own 50 steps.

    Args:
        teacher: an embedded teacher's pipeline.
        steps: sampling steps.
        guidance_scale: w in u + w (c - u).
        num_images: how many pictures are measured.
        name: the embedded teacher's.
        call_options: what else the pipeline is called with.
    """
    measured = [
        measure(
            teacher_sampler(teacher, solver, steps, guidance_scale, **call_options), solver, num_images, teacher=name
        )
        for solver in solvers_of(teacher)
    ]
    return min(measured, key=lambda metrics: metrics.fd_to_teacher or 0.0)


def tiny_metrics(
    teacher: DiffusionPipeline,
    student: RdmDistillationPipeline,
    guidance_scale: float,
    num_images: int,
    name: str = TINY_NAME,
) -> dict[str, Metrics]:
    """`teacher`, `teacher_few_step` and `student`, for students of the embedded teacher of that name.

    The teacher's distances and accuracy are those that `make_teacher` measured; only its time is taken here.
    """
    quality, solver, options = load_quality(name), next(iter(solvers_of(teacher))), teacher_options(student)
    timed = measure(
        teacher_sampler(teacher, solver, TEACHER_STEPS, guidance_scale, **options), solver, 250, teacher=name
    )
    shipped = {key: quality[key] for key in ("fd_to_teacher", "fd_to_data", "prompt_accuracy", "num_images")}
    steps = trained(student).num_inference_steps
    return {
        "teacher": replace(timed, **shipped),
        "teacher_few_step": best_few_step_teacher(teacher, steps, guidance_scale, num_images, name, **options),
        "student": measure(student_sampler(student), "rdm", num_images, teacher=name),
    }


def save_samples(
    path: Path,
    teacher: DiffusionPipeline,
    student: RdmDistillationPipeline,
    guidance_scale: float,
    prompts: Sequence[str],
    batch_size: int = 8,
) -> dict[str, Metrics]:
    """Writes rows of pictures of the same prompts and seeds, `batch_size` drawn at once: teacher, teacher at few steps,
    student; and the student's one by one into `pictures/` beside it.

    Returns:
        What can be said of each row without a reference: network calls and seconds.
    """
    steps, seeds, batch = trained(student).num_inference_steps, range(len(prompts)), min(len(prompts), batch_size)
    many, *_, few = solvers_of(teacher)
    options = teacher_options(student)
    samplers = {
        "teacher": (many, teacher_sampler(teacher, many, TEACHER_STEPS, guidance_scale, batch, **options)),
        "teacher_few_step": (few, teacher_sampler(teacher, few, steps, guidance_scale, batch, **options)),
        "student": ("rdm", student_sampler(student, batch_size=batch)),
    }
    rows, metrics = {}, {}
    for name, (solver, sampler) in samplers.items():
        images, seconds = sampler(prompts, seeds)
        label = f"{name.replace('_', ' ')} ({solver}): {sampler.steps} steps, {sampler.nfe} network calls"
        rows[label] = images
        metrics[name] = Metrics(sampler.nfe, None, None, None, seconds, solver, 0)
    labelled_rows(rows).save(path)
    single = path.parent / "pictures"
    single.mkdir(exist_ok=True)
    for old in single.glob("*.png"):  # of an earlier end of the same run, which may have been more
        old.unlink()
    for i, image in enumerate(images):
        to_pil(image).save(single / f"{i}.png")
    return metrics


def write_metrics(path: Path, metrics: dict[str, Metrics], arguments: dict, prompts: Sequence[str] = ()) -> None:
    """Writes `metrics.json`: every sampler's numbers, the arguments, the prompts of the pictures beside it, the library
    versions and the machine.
    """
    record: dict[str, Any] = {name: measured.as_dict() for name, measured in metrics.items()}
    record["arguments"] = dict(arguments)
    record["prompts"] = list(prompts)
    record["seed"] = arguments.get("seed")
    record["versions"] = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    record["machine"] = machine()
    write_whole(path, json.dumps(record, indent=2) + "\n")


def machine() -> str:
    """The processors and GPUs, in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{os.cpu_count()} x {name}", *gpus])


def as_table(metrics: dict[str, Metrics]) -> str:
    """The numbers as a plain table."""
    columns = ("nfe", "fd_to_teacher", "fd_to_data", "prompt_accuracy", "seconds_per_image")
    lines = [" " * 18 + "".join(f"{column:>18}" for column in columns)]
    for name, measured in metrics.items():
        values = [getattr(measured, column) for column in columns]
        lines.append(
            f"{name:18}" + "".join(f"{'-' if value is None else format(value, '.4g'):>18}" for value in values)
        )
    return "\n".join(lines)
