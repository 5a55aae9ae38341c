"""Pictures of the student as it trains, always of the same prompts and noises."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ..distillation import draw_samples
from ..evaluation.pictures import labelled_rows
from ..families import Conditioning, Teacher
from ..networks import STUDENT
from ..program import one_line
from .checkpoints import TrainState
from .devices import on_device
from .optimizers import averaged
from .prompts import Texts
from .run import Distillation


def averaged_student(run: Distillation, state: TrainState) -> AbstractContextManager[None]:
    """Inside, the student has its averaged weights; afterwards its own again, bit for bit."""
    return nullcontext() if state.ema is None else averaged(state.ema, run.networks.parameters(STUDENT))


@torch.no_grad()
def sample_student(run: Distillation, teacher: Teacher, conditioning: Conditioning) -> torch.Tensor:
    """One picture per prompt `[B, 3, H, W]` in [0, 1], from noises that only the seed decides."""
    generator = run.draws.generator("validation", 0)
    shape = (len(conditioning), *run.latent_shape)
    noise = (torch.randn(shape, generator=generator).to(run.draws.device) for _ in range(run.num_steps))
    return sample_images(run, teacher, conditioning, noise)


@torch.no_grad()
def sample_images(
    run: Distillation, teacher: Teacher, conditioning: Conditioning, noise: Iterable[Tensor]
) -> torch.Tensor:
    """One image for each of B prompts `[B, 3, H, W]` in [0, 1], from the noises `[B, C, H, W]` of all steps."""
    size = run.micro_batch_size
    latents = draw_samples(run.student, run.scheduler, noise, conditioning, micro_batch_size=size)
    with on_device([teacher.pipeline.vae], latents.device):  # one by one, because decoding takes much memory
        return torch.cat([teacher.family.decode(teacher.pipeline, latent) for latent in latents.split(1)])


def validation_picture(run: Distillation, state: TrainState, teacher: Teacher, texts: Texts) -> Image.Image:
    """The student's pictures of the validation prompts in a row. Every process must draw."""
    with averaged_student(run, state):
        images = sample_student(run, teacher, texts.shown_conditioning)
    return labelled_rows({f"student, {run.num_steps} steps, {state.update} updates": images})


def write_picture(picture: Image.Image, update: int, folder: Path, accelerator: Accelerator) -> None:
    """Writes `step-<update>.png` into a folder, and logs it to the trackers; an error becomes a warning."""
    try:
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"step-{update}.png")
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": np.asarray(picture)[None]}, step=update, **layout)
    except Exception as error:  # of the disk, or of a tracker, each of which has errors of its own
        warnings.warn(f"The picture of update {update} could not be shown ({one_line(error)}); the run goes on.",
                      stacklevel=2)  # fmt: skip
