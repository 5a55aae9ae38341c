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

from ..pipelines import RdmDistillationPipeline
from ..tiny.reference import load_quality
from .metrics import Metrics, measure
from .pictures import labelled_rows
from .samplers import TEACHER_SOLVERS, Sampler, teacher_sampler

TEACHER_STEPS = 50
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "huggingface_hub", "safetensors")


def student_sampler(student: RdmDistillationPipeline, batch_size: int = 250) -> Sampler:
    """The student with its trained settings."""
    return Sampler(student, student.student.num_inference_steps, student.student.guidance_scale, batch_size)


def best_few_step_teacher(teacher: DiffusionPipeline, steps: int, guidance_scale: float, num_images: int) -> Metrics:
    """The teacher at the student's number of steps, with whichever solver comes closer to its own 50 steps."""
    measured = [
        measure(teacher_sampler(teacher, solver, steps, guidance_scale), solver, num_images)
        for solver in TEACHER_SOLVERS
    ]
    return min(measured, key=lambda metrics: metrics.fd_to_teacher or 0.0)


def tiny_metrics(
    teacher: DiffusionPipeline, student: RdmDistillationPipeline, guidance_scale: float, num_images: int
) -> dict[str, Metrics]:
    """`teacher`, `teacher_few_step` and `student`, for students of the embedded teacher.

    The teacher's distances and accuracy are those that `make_teacher` measured; only its time is taken here.
    """
    quality, solver = load_quality(), next(iter(TEACHER_SOLVERS))
    timed = measure(teacher_sampler(teacher, solver, TEACHER_STEPS, guidance_scale), solver, 250)
    shipped = {name: quality[name] for name in ("fd_to_teacher", "fd_to_data", "prompt_accuracy", "num_images")}
    steps = student.student.num_inference_steps
    return {
        "teacher": replace(timed, **shipped),
        "teacher_few_step": best_few_step_teacher(teacher, steps, guidance_scale, num_images),
        "student": measure(student_sampler(student), "rdm", num_images),
    }


def save_samples(
    path: Path,
    teacher: DiffusionPipeline,
    student: RdmDistillationPipeline,
    guidance_scale: float,
    prompts: Sequence[str],
) -> dict[str, Metrics]:
    """Writes rows of pictures of the same prompts and seeds: teacher, teacher at few steps, student.

    Returns:
        What can be said of each row without a reference: network calls and seconds.
    """
    steps, seeds, batch = student.student.num_inference_steps, range(len(prompts)), min(len(prompts), 8)
    samplers = {
        "teacher": teacher_sampler(teacher, "ddim", TEACHER_STEPS, guidance_scale, batch),
        "teacher_few_step": teacher_sampler(teacher, "dpm-solver++", steps, guidance_scale, batch),
        "student": student_sampler(student, batch_size=batch),
    }
    rows, metrics = {}, {}
    for name, sampler in samplers.items():
        images, seconds = sampler(prompts, seeds)
        rows[f"{name.replace('_', ' ')}: {sampler.steps} steps, {sampler.nfe} network calls"] = images
        metrics[name] = Metrics(sampler.nfe, None, None, None, seconds, type(sampler.pipeline.scheduler).__name__, 0)
    labelled_rows(rows).save(path)
    return metrics


def write_metrics(path: Path, metrics: dict[str, Metrics], arguments: dict) -> None:
    """Writes `metrics.json`: every sampler's numbers, the arguments, the library versions and the machine."""
    record: dict[str, Any] = {name: measured.as_dict() for name, measured in metrics.items()}
    record["arguments"] = {name: value for name, value in arguments.items() if "token" not in name}
    record["seed"] = arguments.get("seed")
    record["versions"] = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    record["machine"] = machine()
    path.write_text(json.dumps(record, indent=2) + "\n")


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
