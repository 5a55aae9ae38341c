"""Anything that draws pictures for prompts and seeds, behind one call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from torch import Tensor

from ..families import rebuilt

TEACHER_SOLVERS = {"ddim": DDIMScheduler, "dpm-solver++": DPMSolverMultistepScheduler}


@dataclass
class Sampler:
    """A pipeline with its settings.

    Args:
        pipeline: any text-to-image pipeline.
        steps: sampling steps.
        guidance_scale: w in u + w (c - u), two network calls a step when above 1; at most 1 is off, with one call.
        batch_size: pictures drawn at once; a picture depends on its seed only.
    """

    pipeline: DiffusionPipeline
    steps: int
    guidance_scale: float
    batch_size: int = 250

    @property
    def nfe(self) -> int:
        """Network calls for one picture, guidance included."""
        return self.steps * (2 if self.guidance_scale > 1 else 1)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, float]:
        """Draws one picture per prompt and seed.

        Returns:
            Images `[N, 3, H, W]` in [0, 1], float32, on the CPU, and the seconds that one took on average.
        """
        self.pipeline.set_progress_bar_config(disable=True)
        started, parts = time.perf_counter(), []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            output = self.pipeline(
                list(prompts[part]),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                output_type="pt",
            )
            parts.append(output.images.float().cpu())
        return torch.cat(parts), (time.perf_counter() - started) / len(prompts)


def teacher_sampler(
    pipeline: DiffusionPipeline, solver: str, steps: int, guidance_scale: float, batch_size: int = 250
) -> Sampler:
    """The teacher with one of `TEACHER_SOLVERS`, on a copy of the pipeline that shares its networks."""
    scheduler = TEACHER_SOLVERS[solver].from_config(pipeline.scheduler.config)
    return Sampler(rebuilt(type(pipeline), pipeline, scheduler=scheduler), steps, guidance_scale, batch_size)
