"""The teacher's contrast, with which the monitor compares the student's."""

from __future__ import annotations

from functools import partial

import torch

from ..distillation import draw_samples
from ..families import Teacher
from ..networks import TEACHER
from .assembly import make_scheduler
from .run import Distillation

CONTRAST_STEPS = 20  # of the teacher


@torch.no_grad()
def teacher_contrast(run: Distillation, teacher: Teacher, count: int) -> float | None:
    """The standard deviation of the teacher's latents, over `count` pictures of 20 steps; None if none are wanted."""
    if count == 0:
        return None
    prompts = run.prompts.prompts
    conditioning = run.prompts.once([i * len(prompts) // count for i in range(count)])
    generators = [run.draws.generator("contrast", i) for i in range(count)]
    noise = torch.stack([torch.randn(run.latent_shape, generator=generator) for generator in generators])
    latents = draw_samples(
        partial(run.networks.predict, TEACHER),
        make_scheduler(teacher, CONTRAST_STEPS, eta=0.0),
        [noise.to(run.draws.device)],
        conditioning,
        micro_batch_size=run.micro_batch_size,
    )
    run.networks.calls.clear()
    return latents.std().item()
