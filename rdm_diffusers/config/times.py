"""Noise levels: where the student steps, where R_dm is estimated, and where the fake score learns."""

from __future__ import annotations

from dataclasses import dataclass

from ..bounds import OneOf, real, whole
from .fields import flag

GRIDS = ("even", "shifted")


# fmt: off
@dataclass(frozen=True)
class TimesConfig:
    """The student's grid, and the distributions of re-noising times and of the fake score's."""

    student_grid: str = flag(
        "even", "even: evenly spaced times; shifted: for flow, even noise levels with the teacher's shift",
        OneOf(GRIDS))
    student_sigmas: tuple[float, ...] = flag(
        (), "for flow, the noise levels of the student's steps, descending; they set --num_student_steps",
        real("(0, 1]"))
    student_timesteps: tuple[int, ...] = flag(
        (), "for other teachers, the timesteps of the student's steps, descending; they set --num_student_steps",
        whole("[1, 100000]"))
# fmt: on
