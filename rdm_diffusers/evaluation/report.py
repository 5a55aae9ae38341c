"""The metrics and pictures at the end of a run: the student beside its teacher."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..folders import write_whole
from ..frechet import GaussianStatistics, frechet_distance
from ..pipelines import RdmDistillationPipeline
from ..tiny import TINY_NAME
from ..tiny.domains import domain_of, reader_of
from ..tiny.reference import load_quality, load_statistics
from .pictures import labelled_rows, to_pil
from .prompt_sets import prompts_for
from .records import number
from .subjects import (
    TEACHER_STEPS,
    Sampler,
    installed_versions,
    solvers_of,
    student_sampler,
    student_settings,
    teacher_options,
    teacher_sampler,
)

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "huggingface_hub", "safetensors")
COLUMNS = ("nfe", "fd_to_teacher", "fd_to_data", "prompt_accuracy", "seconds_per_image")
TIMED_IMAGES = 250
COMPARED_IMAGES = 480  # choose the teacher's solver at few steps


@dataclass(frozen=True)
class Metrics:
    """The metrics of one sampler.

    Args:
        nfe: network calls for one picture, guidance included.
        fd_to_teacher: Fréchet distance to the teacher's 50-step pictures in the tiny feature network; None if not
            measured.
        fd_to_data: the same to the training pictures.
        prompt_accuracy: the share of pictures that show all that their prompts say.
        seconds_per_image: wall-clock time, decoding included.
        sampler: the solver's name.
        num_images: how many pictures were measured; 0 for none.
    """

    nfe: int
    fd_to_teacher: float | None
    fd_to_data: float | None
    prompt_accuracy: float | None
    seconds_per_image: float
    sampler: str
    num_images: int

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def evaluation_prompts(count: int, teacher: str = TINY_NAME) -> list[str]:
    """`count` captions of a tiny teacher; every one occurs equally often."""
    return prompts_for(domain_of(teacher).captions, range(count))


def measure(
    sampler: Sampler, name: str, num_images: int, first_seed: int = 1_000_000, teacher: str = TINY_NAME
) -> Metrics:
    """Draws pictures of the captions in turn with a tiny teacher or its student, and measures them.

    Args:
        sampler: draws them.
        name: of the solver, for the record.
        num_images: how many are drawn.
        first_seed: of the first picture; the others have the following ones.
        teacher: the tiny teacher whose pictures are the reference.
    """
    prompts = evaluation_prompts(num_images, teacher)
    images, seconds = sampler(prompts, range(first_seed, first_seed + num_images))
    return measure_images(images, prompts, sampler.nfe, seconds, name, teacher)


def measure_images(
    images: Tensor, prompts: Sequence[str], nfe: int, seconds: float, name: str, teacher: str = TINY_NAME
) -> Metrics:
    """Measures existing pictures `[N, 3, S, S]` in [0, 1], as `measure` does."""
    domain, reference = domain_of(teacher), load_statistics(teacher)
    reader = reader_of(domain, torch.device("cpu"))
    statistics = GaussianStatistics.of(reader.features(images))
    correct = reader.correct(images, [domain.parse(prompt) for prompt in prompts])
    return Metrics(
        nfe=nfe,
        fd_to_teacher=frechet_distance(statistics, reference["teacher"]),
        fd_to_data=frechet_distance(statistics, reference["data"]),
        prompt_accuracy=correct["all"].float().mean().item(),
        seconds_per_image=seconds,
        sampler=name,
        num_images=len(images),
    )


def best_few_step_teacher(
    teacher: DiffusionPipeline,
    steps: int,
    guidance_scale: float,
    num_images: int,
    name: str = TINY_NAME,
    **call_options: Any,
) -> Metrics:
    """The tiny teacher of that name at few steps, with the solver whose pictures are closest to its own 50 steps.

    `COMPARED_IMAGES` of each solver choose it.
    """
    sampler_of = partial(teacher_sampler, teacher, steps=steps, guidance_scale=guidance_scale, **call_options)
    few = min(num_images, COMPARED_IMAGES)
    compared = [measure(sampler_of(solver=solver), solver, few, teacher=name) for solver in solvers_of(teacher)]
    best = min(compared, key=lambda metrics: metrics.fd_to_teacher or 0.0)
    if few == num_images:
        return best
    return measure(sampler_of(solver=best.sampler), best.sampler, num_images, teacher=name)


def tiny_metrics(
    teacher: DiffusionPipeline,
    student: RdmDistillationPipeline,
    guidance_scale: float,
    num_images: int,
    name: str = TINY_NAME,
) -> dict[str, Metrics]:
    """The metrics of `teacher`, `teacher_few_step` and `student`, for a student of the tiny teacher of that name.

    The teacher's distances and accuracy are read from its shipped quality; only its time is measured here.
    """
    quality, solver, options = load_quality(name), next(iter(solvers_of(teacher))), teacher_options(student)
    many_steps = teacher_sampler(teacher, solver, TEACHER_STEPS, guidance_scale, **options)
    timed = measure(many_steps, solver, min(TIMED_IMAGES, num_images), teacher=name)
    shipped = {key: quality[key] for key in ("fd_to_teacher", "fd_to_data", "prompt_accuracy", "num_images")}
    steps = student_settings(student).num_inference_steps
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
    """Writes rows of pictures of the same prompts and seeds: teacher, teacher at few steps, student.

    The student's pictures also go one by one into the folder `pictures` beside it.

    Returns:
        The metrics of each row that need no reference: network calls and seconds.
    """
    steps, options = student_settings(student).num_inference_steps, teacher_options(student)
    batch, (many, *_, few) = min(len(prompts), batch_size), solvers_of(teacher)
    samplers = {
        "teacher": (many, teacher_sampler(teacher, many, TEACHER_STEPS, guidance_scale, batch, **options)),
        "teacher_few_step": (few, teacher_sampler(teacher, few, steps, guidance_scale, batch, **options)),
        "student": ("rdm", student_sampler(student, batch_size=batch)),
    }
    rows, metrics = {}, {}
    for name, (solver, sampler) in samplers.items():
        images, seconds = sampler(prompts, range(len(prompts)))
        label = f"{name.replace('_', ' ')} ({solver}): {sampler.steps} steps, {sampler.nfe} network calls"
        rows[label] = images
        metrics[name] = Metrics(sampler.nfe, None, None, None, seconds, solver, 0)
    labelled_rows(rows).save(path)
    single = path.parent / "pictures"
    single.mkdir(exist_ok=True)
    for old in single.glob("*.png"):  # an earlier end of the same run may have left more
        old.unlink()
    for i, image in enumerate(images):
        to_pil(image).save(single / f"{i}.png")
    return metrics


def write_metrics(
    path: Path, metrics: Mapping[str, Metrics], arguments: Mapping[str, Any], prompts: Sequence[str] = ()
) -> None:
    """Writes `metrics.json`: every sampler's metrics, the run's arguments, its pictures' prompts, versions, machine."""
    record: dict[str, Any] = {name: measured.as_dict() for name, measured in metrics.items()} | {
        "arguments": dict(arguments),
        "prompts": list(prompts),
        "seed": arguments.get("seed"),
        "versions": installed_versions(PACKAGES) | {"python": platform.python_version()},
        "machine": machine(),
    }
    write_whole(path, json.dumps(record, indent=2) + "\n")


def machine() -> str:
    """The processors and GPUs, in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{os.cpu_count()} x {name}", *gpus])


def as_table(metrics: Mapping[str, Metrics]) -> str:
    """The metrics as a plain table."""
    rows = [[name, *(number(getattr(row, column)) for column in COLUMNS)] for name, row in metrics.items()]
    return "\n".join(f"{row[0]:18}" + "".join(f"{cell:>18}" for cell in row[1:]) for row in [["", *COLUMNS], *rows])
