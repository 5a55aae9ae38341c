"""What can be wrong with the LoRAs that a run begins with, seen before any weights of the teacher are read."""

from __future__ import annotations

import warnings
from typing import Any

from ..config import LoraStudentConfig, RunConfig
from ..families import Family, Lora, check_lora_not_distilled, read_lora
from .assembly import lora_config
from .memory_model import meta_models, meta_pipeline

FEW = 5  # layers in an error message


def check_loras(config: RunConfig, index: dict[str, Any], family: Family) -> None:
    """Loads `--teacher_lora` and `--init_lora` into the teacher's networks on the meta device.

    Args:
        config: the run's.
        index: the teacher's `pipeline_config`.
        family: the teacher's.

    Raises:
        ValueError: if one does not fit the teacher, or the student.
    """
    if not family.has_lora:
        raise ValueError(f"{family.pipeline_class.__name__} loads no LoRAs; leave --teacher_lora out.")
    source, student, denoiser = config.teacher, config.student, family.denoiser_name
    networks = meta_models(source.configuration, index, source.revision)
    pipeline = meta_pipeline(family, networks)
    for lora in [Lora.parse(each) for each in source.teacher_lora]:
        if warning := check_lora_not_distilled(lora):
            warnings.warn(warning, stacklevel=2)
        parts = sorted(read_lora(pipeline, lora).keys() - {denoiser})
        if parts and isinstance(student, LoraStudentConfig) and student.student_base == "plain":
            raise ValueError(
                f"The LoRA {lora.name} adapts the {' and '.join(parts)}, too, which a student's file cannot hold; "
                "add --student_base teacher."
            )
    if isinstance(student, LoraStudentConfig) and student.init_lora:
        lora = Lora.parse(student.init_lora)
        layers = read_lora(pipeline, lora)
        parts = sorted(layers.keys() - {denoiser})
        if parts:
            raise ValueError(
                f"--init_lora {lora.name} adapts the {' and '.join(parts)}, which a student does not; give another."
            )
        rank = max(len(down) for down, _ in layers[denoiser].values())
        if rank > student.rank:
            raise ValueError(
                f"--init_lora {lora.name} is of rank {rank}, more than --rank {student.rank}; leave --rank out, or "
                f"give at least {rank}."
            )
        _check_layers(lora, list(layers[denoiser]), sorted(lora_config(family, student).target_modules))


def _check_layers(lora: Lora, layers: list[str], targets: list[str]) -> None:
    """Refuses a LoRA with layers that are none of the student's."""
    others = [name for name in layers if not any(f".{name}".endswith(f".{target}") for target in targets)]
    if others:
        more = f" and {len(others) - FEW} others" if len(others) > FEW else ""
        raise ValueError(
            f"--init_lora {lora.name} adapts {', '.join(others[:FEW])}{more}, which the student does not; name them in "
            f"--lora_layers beside {','.join(targets)}."
        )
