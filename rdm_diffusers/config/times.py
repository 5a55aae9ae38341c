"""Noise levels: where the student steps, R_dm is estimated, the fake score learns, and the teacher is guided."""

from __future__ import annotations

from dataclasses import dataclass

from ..bounds import GUIDANCE, OneOf, real, whole
from ..distillation import RENOISINGS, TIME_DISTRIBUTIONS
from .fields import flag

GRIDS = ("even", "shifted")


# fmt: off
@dataclass(frozen=True)
class TimesConfig:
    """The student's grid, where R_dm is estimated and at which guidance."""

    student_grid: str = flag(
        "even", "even: evenly spaced times; shifted: for flow, even noise levels with the teacher's shift",
        OneOf(GRIDS))
    student_sigmas: tuple[float, ...] = flag(
        (), "for flow, the noise levels of the student's steps, descending; they set --num_student_steps",
        real("(0, 1]"))
    student_timesteps: tuple[int, ...] = flag(
        (), "for other teachers, the timesteps of the student's steps, descending; they set --num_student_steps",
        whole("[1, 100000]"))
    renoising: str = flag(
        "x0", "x0: R_dm is estimated where x0 has fresh noise, at any noise level; interval: where the student's next "
        "state is diffused further, up to the noise level of its step (TDM, whose default it is); above: the same, up "
        "to the highest noise level", OneOf(RENOISINGS))
    renoising_time_distribution: str = flag(
        "uniform", "of the times at which R_dm is estimated; shifted: by the shift of a flow teacher",
        OneOf(TIME_DISTRIBUTIONS))
    fake_time_distribution: str = flag(
        "uniform", "of the times of the fake score's loss", OneOf(TIME_DISTRIBUTIONS))
    logit_mean: float = flag(0.0, "of logit_normal; above 0 there is more noise", real("[-20, 20]"))
    logit_std: float = flag(1.0, "of logit_normal", real("(0, 20]"))
    guidance_interval: tuple[float, ...] = flag(
        (), "two shares of the timesteps, between which R_dm's teacher is guided; elsewhere it is not; 1 is noise",
        real("[0, 1]"))
    guidance_range: tuple[float, ...] = flag(
        (), "two scales, between which the teacher's w in R_dm is another one for each sample, instead of "
        "--guidance_scale; snoopi has half to one and a half times what guidance adds by default", GUIDANCE)
    decoupled_guidance: bool = flag(
        False, "estimate what guidance adds to R_dm at noise levels of its own, below the student's own step")
# fmt: on
