"""Students and teachers as samplers: one call draws pictures for prompts and seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from torch import Tensor

from ..families import FAMILIES, rebuilt
from ..pipelines import RdmDistillationPipeline, StudentConfig

TEACHER_STEPS = 50
READING = ("max_sequence_length", "height", "width", "use_resolution_binning")  # options for reading prompts and sizes

Solver = Callable[[SchedulerMixin, int], SchedulerMixin]  # the teacher's own scheduler, steps -> the solver


def _flow_dpm_solver(own: SchedulerMixin, steps: int) -> SchedulerMixin:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": _shift(own)}
    return DPMSolverMultistepScheduler.from_config(own.config, **flow)


def _euler(own: SchedulerMixin, steps: int) -> SchedulerMixin:
    return FlowMatchEulerDiscreteScheduler.from_config(own.config, shift=_shift(own))


def _trailing_euler(own: SchedulerMixin, steps: int) -> SchedulerMixin:
    """The last step starts at sigma = 1/K, shifted; the default grid wastes it on a sigma of nearly 0."""
    if own.config.get("use_dynamic_shifting") or steps == 1:  # the pipeline sets the grid
        return _euler(own, steps)
    last = _shift(own) / (steps + _shift(own) - 1)
    return FlowMatchEulerDiscreteScheduler.from_config(own.config, shift=_shift(own), shift_terminal=last)


def _shift(own: SchedulerMixin) -> float:
    return own.config.get("shift", own.config.get("flow_shift", 1.0))


# The first of each is the default, for many steps; samples.png shows the last one at few steps.
TEACHER_SOLVERS: dict[str, Solver] = {
    "ddim": lambda own, steps: DDIMScheduler.from_config(own.config),
    "dpm-solver++": lambda own, steps: DPMSolverMultistepScheduler.from_config(own.config),
}
FLOW_SOLVERS: dict[str, Solver] = {
    "euler": _euler,
    "dpm-solver++": _flow_dpm_solver,
    "euler-trailing": _trailing_euler,
}


@dataclass
class Sampler:
    """A pipeline with its settings.

    Args:
        pipeline: any text-to-image pipeline.
        steps: sampling steps.
        guided: whether a step takes two network calls, one of them without the prompt.
        batch_size: pictures drawn at once; a picture depends on its prompt and seed only.
        call_options: further arguments of the pipeline, for example `max_sequence_length`.
    """

    pipeline: DiffusionPipeline
    steps: int
    guided: bool
    batch_size: int = 250
    call_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nfe(self) -> int:
        """Network calls for one picture, guidance included."""
        return self.steps * (2 if self.guided else 1)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, float]:
        """Draws one picture per prompt and seed.

        Returns:
            Images `[N, 3, H, W]` in [0, 1], float32, on the CPU, and the average seconds for one.
        """
        self.pipeline.set_progress_bar_config(disable=True)
        started, parts = time.perf_counter(), []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            output = self.pipeline(
                list(prompts[part]),
                num_inference_steps=self.steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                output_type="pt",
                **self.call_options,
            )
            parts.append(output.images.float().cpu())
        return torch.cat(parts), (time.perf_counter() - started) / len(prompts)


def solvers_of(pipeline: DiffusionPipeline) -> dict[str, Solver]:
    """The solvers that sample this teacher: `TEACHER_SOLVERS`, or for flow matching `FLOW_SOLVERS`."""
    family = FAMILIES[type(pipeline).__name__]
    return FLOW_SOLVERS if family.prediction_type(pipeline.scheduler) == "flow_prediction" else TEACHER_SOLVERS


def teacher_sampler(
    pipeline: DiffusionPipeline,
    solver: str,
    steps: int,
    guidance_scale: float,
    batch_size: int = 250,
    **call_options: Any,
) -> Sampler:
    """The teacher with one of its `solvers_of`, on a copy of the pipeline that shares its networks."""
    family = FAMILIES[type(pipeline).__name__]
    copy = rebuilt(type(pipeline), pipeline, scheduler=solvers_of(pipeline)[solver](pipeline.scheduler, steps))
    calls_twice = guidance_scale > 1 and not family.embeds_guidance(pipeline)
    call_options = {**family.guided(guidance_scale), **call_options}
    return Sampler(copy, steps, calls_twice, batch_size, call_options)


def student_settings(student: RdmDistillationPipeline) -> StudentConfig:
    """The settings that a student was trained with.

    Raises:
        ValueError: for a pipeline without a student.
    """
    if student.student is None:
        raise ValueError(f"This {type(student).__name__} holds no student; load one with from_pretrained.")
    return student.student


def student_sampler(student: RdmDistillationPipeline, batch_size: int = 250, steps: int | None = None) -> Sampler:
    """The student with its trained settings, or with another number of steps."""
    return Sampler(student, steps or student_settings(student).num_inference_steps, False, batch_size)


def teacher_options(student: RdmDistillationPipeline) -> dict[str, Any]:
    """The options with which the student's teacher reads prompts as the student does."""
    return {key: value for key, value in student_settings(student).call_arguments.items() if key in READING}
