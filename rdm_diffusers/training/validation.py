"""Pictures of the student as it trains, always of the same prompts and noises."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from ..distillation import rollout
from ..evaluation.pictures import labelled_rows
from ..families import Teacher
from ..networks import STUDENT
from .checkpoints import TrainState
from .updates import Distillation


@contextmanager
def averaged_student(run: Distillation, state: TrainState) -> Iterator[None]:
    """Inside, the student has its averaged weights; afterwards its own again, bit for bit."""
    if state.ema is None:
        yield
        return
    parameters = run.networks.parameters(STUDENT)
    state.ema.store(parameters)
    state.ema.copy_to(parameters)
    try:
        yield
    finally:
        state.ema.restore(parameters)


@torch.no_grad()
def sample_student(run: Distillation, teacher: Teacher, prompts: list[str]) -> torch.Tensor:
    """One picture per prompt `[B, 3, H, W]` in [0, 1], from noises that only the seed decides."""
    conditioning = teacher.encode_prompts(prompts)
    generator = run.draws.generator("validation", 0)
    shape = (len(prompts), *run.latent_shape)
    noise = [torch.randn(shape, generator=generator).to(run.draws.device) for _ in range(run.num_steps + 1)]
    trajectory = rollout(
        run.student, run.scheduler, noise, conditioning, micro_batch_size=run.micro_batch_size,
    )  # fmt: skip
    return teacher.family.decode(teacher.pipeline, trajectory.next[-1])


def spread(prompts: Sequence[str], count: int) -> list[str]:
    """`count` prompts spread evenly over those given, repeated where there are fewer."""
    return [prompts[i * len(prompts) // count] for i in range(count)]


def validate(
    update: int,
    run: Distillation,
    state: TrainState,
    teacher: Teacher,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> None:
    """Writes `validation/step-<update>.png` and shows it to the trackers."""
    prompts = spread(args.validation_prompt or run.prompts.prompts, args.num_validation_images)
    with averaged_student(run, state):
        images = sample_student(run, teacher, prompts)
    picture = labelled_rows({f"student, {run.num_steps} steps, {update} updates": images})
    folder = Path(args.output_dir) / "validation"
    folder.mkdir(exist_ok=True)
    picture.save(folder / f"step-{update}.png")
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(picture)[None]}, step=update, **layout)
