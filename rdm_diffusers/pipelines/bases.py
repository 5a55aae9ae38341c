"""Whether a base model is one that a student's LoRA can be put on."""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin

from ..families import FAMILIES, schedule_of
from ..schedulers import RdmScheduler
from .student_config import StudentConfig

TOLERANCE = 1e-5  # of squared alphas; zero terminal SNR is 0 in some stock schedulers and 6e-8 in others


def check_base(student: StudentConfig, name: str, scheduler: SchedulerMixin) -> None:
    """Refuses bases whose outputs mean something else than the teacher's did, on which a student would draw noise.

    Args:
        student: what is known of it.
        name: of the base, for the error's sentence.
        scheduler: the base's, of whatever solver.

    Raises:
        ValueError: if it is of another prediction type, or of another noise schedule.
    """
    family, trained = FAMILIES[student.pipeline_class], RdmScheduler.from_config(student.scheduler)
    known, found = trained.config.prediction_type, family.prediction_type(scheduler)
    if found != known:
        raise ValueError(
            f"The student was distilled from a teacher of prediction type {known}, and {name} is of {found}; give a "
            f"base of {known}."
        )
    ours, theirs = trained.schedule, schedule_of(family, scheduler)
    same = ours.num_train_timesteps == theirs.num_train_timesteps
    if same and ours.alphas_cumprod is not None and theirs.alphas_cumprod is not None:
        same = torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod.cpu().float(), rtol=0, atol=TOLERANCE)
    if not same:
        raise ValueError(
            f"The student was distilled with another noise schedule than that of {name}; give a base with the "
            "teacher's betas (see its scheduler_config.json)."
        )
