"""Checks of the student's grid, and of the times at which R_dm is estimated, guided and learnt."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from ..distillation import THROUGH_NETWORKS

if TYPE_CHECKING:
    from .run_config import RunConfig


def check_times(config: RunConfig) -> None:
    """ValueError for times that exclude each other or would have no effect."""
    _check_grid(config)
    _check_guidance(config)
    _check_distributions(config)


def _check_grid(config: RunConfig) -> None:
    times = config.times
    grids = {name: getattr(times, name) for name in ("student_sigmas", "student_timesteps") if getattr(times, name)}
    if len(grids) + (times.student_grid != "even") > 1:
        raise ValueError("--student_sigmas, --student_timesteps and --student_grid exclude each other; give one.")
    for name, grid in grids.items():
        if any(earlier <= later for earlier, later in pairwise(grid)):
            raise ValueError(f"--{name} is {' '.join(map(str, grid))}; each must be below the one before.")
        if len(grid) != config.method.num_student_steps:
            raise ValueError(
                f"--num_student_steps is {config.method.num_student_steps}, and --{name} has {len(grid)} steps; leave "
                "--num_student_steps out, which follows from it."
            )


def _check_guidance(config: RunConfig) -> None:
    if config.method.algorithm == "snoopi" and (
        config.target.teacher_target == "samples" or config.method.guidance_scale <= 1
    ):
        raise ValueError(
            "--algorithm snoopi varies the guidance of the teacher's score: it needs --teacher_target score and a "
            "--guidance_scale above 1."
        )
    for name in ("guidance_interval", "guidance_range"):
        ends = getattr(config.times, name)
        if ends and not (len(ends) == 2 and ends[0] < ends[1]):
            raise ValueError(f"--{name} is {' '.join(map(str, ends))}; give two numbers, the lower first.")
    for name in ("guidance_interval", "guidance_range", "decoupled_guidance"):
        if getattr(config.times, name) and config.target.teacher_target == "samples":
            raise ValueError(
                f"--{name} is for --teacher_target score, because a target is not guided; add that, or leave it out."
            )
        if getattr(config.times, name) and config.method.guidance_scale == 1:
            raise ValueError(f"--{name} would have no effect with --guidance_scale 1, which is no guidance.")
    algorithm = config.method.algorithm
    if config.times.decoupled_guidance and algorithm in THROUGH_NETWORKS:
        raise ValueError(
            f"--algorithm {algorithm} has gradients through the teacher at one time, and --decoupled_guidance has two; "
            "leave that out."
        )


def _check_distributions(config: RunConfig) -> None:
    times, method = config.times, config.method
    if times.renoising != "x0" and method.num_student_steps == 1 and method.algorithm != "tdm":
        raise ValueError(
            f"--renoising {times.renoising} would have no effect on a student of one step, which has no next state; "
            "leave it out."
        )
    if "logit_normal" in (times.renoising_time_distribution, times.fake_time_distribution):
        return
    for name, usual in (("logit_mean", 0), ("logit_std", 1)):
        if getattr(times, name) != usual:
            raise ValueError(
                f"--{name} would have no effect; leave it out, or add --renoising_time_distribution logit_normal or "
                "--fake_time_distribution logit_normal."
            )
