"""What a LoRA student needs of its base model: the teacher's noise schedule, and the LoRAs that the teacher had."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from ..families import FAMILIES, Lora, fuse_loras, load_parts, parts_of, schedule_of
from ..folders import digest_of_file
from ..schedulers import RdmScheduler
from .student_config import StudentConfig, warn_of_change

TOLERANCE = 1e-5  # of squared alphas; zero terminal SNR is 0 in some stock schedulers and 6e-8 in others


def shown(loras: Sequence[Lora]) -> str:
    """`the LoRA me/style/file.safetensors (scale 0.8)`, or several of them."""
    named = [f"{lora.name} (scale {lora.scale:g})" for lora in loras]
    return f"the LoRA{'s' if len(named) > 1 else ''} {', '.join(named)}"


def load_file_parts(
    student: StudentConfig, index: dict[str, Any], dtype: torch.dtype, without: Collection[str], **hub_options: Any
) -> dict[str, torch.nn.Module]:
    """The networks of a base model that are in its single file, none for other base models; warns of another file.

    Args:
        student: its configuration.
        index: the `pipeline_config` of the base model's configuration.
        dtype: of the weights.
        without: components that are not wanted.
        hub_options: as of `fetch`.

    Raises:
        ValueError: if the file is missing, damaged or of another kind.
    """
    file, family = student.file, FAMILIES[student.pipeline_class]
    if file is None or student.base_file is None:
        return {}
    path = file.path(**hub_options)
    once = {name: value for name, value in hub_options.items() if name != "force_download"}  # the file is there now
    names = [name for name in parts_of(file, index, family, **once) if name not in without]
    if student.base_file["sha256"] not in ("", file.digest(**once)):
        warn_of_change(path, "base_file")
    return load_parts(file, index, names, dtype, **once)


def add_loras(pipeline: DiffusionPipeline, student: StudentConfig, hub_options: dict[str, Any]) -> None:
    """Adds the LoRAs that a student's teacher had to the weights of its base model; warns if a file has changed.

    Args:
        pipeline: the base model's, changed in place.
        student: its configuration.
        hub_options: as of `fetch`.

    Raises:
        ValueError: if one is missing, or does not fit the base model.
    """
    for lora, entry in zip(student.loras, student.base_loras, strict=True):
        path: Path = lora.file(**hub_options)
        if digest_of_file(path) != entry["sha256"]:
            warn_of_change(path, "base_loras")
    fuse_loras(pipeline, FAMILIES[student.pipeline_class], student.loras, **hub_options)


def check_noise_schedule(student: StudentConfig, name: str, scheduler: SchedulerMixin) -> None:
    """Refuses a base model on which a student would draw noise, because its outputs mean something else.

    Args:
        student: its configuration.
        name: of the base model, for the error.
        scheduler: the base model's, of any solver.

    Raises:
        ValueError: if the prediction type or the noise schedule is not the teacher's.
    """
    family, own = FAMILIES[student.pipeline_class], RdmScheduler.from_config(student.scheduler)
    prediction_type = family.prediction_type(scheduler)
    if prediction_type != own.config.prediction_type:
        raise ValueError(
            f"The student was distilled from a teacher of prediction type {own.config.prediction_type}, and {name} is "
            f"of {prediction_type}; give a base of {own.config.prediction_type}."
        )
    ours, theirs = own.schedule, schedule_of(family, scheduler)
    same = ours.num_train_timesteps == theirs.num_train_timesteps
    if same and ours.alphas_cumprod is not None and theirs.alphas_cumprod is not None:
        same = torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod.cpu().float(), rtol=0, atol=TOLERANCE)
    if not same:
        raise ValueError(
            f"The student was distilled with another noise schedule than that of {name}; give a base with the "
            "teacher's betas (see its scheduler_config.json)."
        )
