"""Aspect-ratio buckets: a run whose rollouts have different sizes, each of them one.

All groups of a rollout share a size, so that they share micro-batches, statistics and, on several GPUs, the amount of
work. What depends on the size is the latents' shape, what prompts say of it (SDXL), and the shift of a flow teacher
whose shift depends on it. The student's grid does not: a student has one.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..config import RunConfig
from ..families import Teacher
from ..sizes import Resolution
from .assembly import teacher_shift
from .run import Distillation


def with_buckets(run: Distillation, teacher: Teacher, config: RunConfig) -> Distillation:
    """The run with its `--aspect_ratio_buckets`, if it has several."""
    if len(config.teacher.sizes) == 1:
        return run
    sizes = (size for size in config.teacher.sizes if size is not None)
    return replace(run, buckets=tuple(at_size(run, teacher, config, size) for size in sizes))


def at_size(run: Distillation, teacher: Teacher, config: RunConfig, size: Resolution) -> Distillation:
    """The run with pictures of another size; its networks, its random numbers and its checks are the same ones."""
    family, pipeline = teacher.family, teacher.pipeline
    shift = teacher_shift(teacher, config.changed("teacher", resolution=size))
    return replace(
        run,
        latent_shape=family.latent_shape(pipeline, size),
        prompts=replace(run.prompts, at_size=partial(family.at_size, pipeline, resolution=size)),
        renoising_distribution=replace(run.renoising_distribution, shift=shift),
        fake_distribution=replace(run.fake_distribution, shift=shift),
    )
