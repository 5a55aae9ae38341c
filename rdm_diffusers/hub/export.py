"""Writes a student as files that stock diffusers loads, and that our pipeline loads with its trained settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from diffusers.training_utils import _collate_lora_metadata
from safetensors.torch import save_file
from torch import Tensor

from ..families import FAMILIES, LORA_FILE, Teacher, full_name, rebuilt
from ..pipelines import CLASSES, RdmDistillationPipeline, StudentConfig
from ..pipelines.lora_file import digest_of_lora
from ..schedulers import RdmScheduler
from ..untrusted import digest_of
from .comfyui import comfyui_name, has_comfyui, read_lora, write_comfyui
from .licenses import license_of
from .placing import replacing, writing
from .student_files import copy_files, read_scheduler

COMFYUI_FOLDER = "comfyui"  # in a LoRA student's


def export_lora(
    folder: Path, teacher: Teacher, weights: Mapping[str, Tensor], scheduler: RdmScheduler, **origin
) -> None:
    """Writes `pytorch_lora_weights.safetensors`, `scheduler/`, `rdm_config.json`, and if possible a file for ComfyUI.

    Args:
        folder: an existing folder; an older student in it is replaced, as a whole or not at all.
        teacher: the teacher that the LoRA belongs to, with its adapters.
        weights: the student's (`Networks.student_weights`).
        scheduler: the student's sampler with its trained grid.
        origin: `revision` and `variant` of the teacher, if any; `training`, as in `StudentConfig`.

    Raises:
        WritingError: for example on a full disk.
    """
    component = teacher.family.denoiser_name
    layers = {f"{component}_lora_layers": dict(weights)}
    stock = teacher.family.stock_scheduler(teacher.pipeline.scheduler, len(scheduler.timesteps), scheduler.config.eta)
    names = {"base_model_name_or_path": full_name(teacher.name), "vae": teacher.vae and full_name(teacher.vae)}
    with replacing(folder) as new:
        teacher.family.pipeline_class.save_lora_weights(
            new, **layers, **_collate_lora_metadata({component: teacher.denoiser})
        )
        stock.save_pretrained(new / "scheduler")
        names["weights_sha256"] = digest_of_lora(new / LORA_FILE)
        names["scheduler_sha256"] = digest_of(read_scheduler(new))
        _student_config(teacher, scheduler, **names, **origin).save(new)
        _add_comfyui(new, teacher.family.pipeline_class.__name__, teacher.denoiser.config)


def _add_comfyui(folder: Path, pipeline_class: str, config: Mapping | None = None) -> None:
    """Writes `comfyui/<folder's name>.safetensors`, in a subfolder where `load_lora_weights` does not find it."""
    if has_comfyui(pipeline_class):
        write_comfyui(folder, folder / COMFYUI_FOLDER / comfyui_name(folder), pipeline_class, config=config)


def export_full(
    folder: Path,
    teacher: Teacher,
    weights: Mapping[str, Tensor],
    config: Mapping,
    scheduler: RdmScheduler,
    training: dict | None = None,
) -> None:
    """Writes a whole stock pipeline: the teacher's, with the student's network and scheduler, and `rdm_config.json`.

    Args:
        folder, weights, scheduler: as in `export_lora`.
        teacher: the teacher, whose text encoders and autoencoder the student shares.
        config: the student network's configuration.
        training: as in `StudentConfig`.

    Raises:
        WritingError: for example on a full disk.
    """
    with torch.device("meta"):
        denoiser = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    denoiser.load_state_dict(weights, assign=True)
    pipeline_class = CLASSES[teacher.family.pipeline_class.__name__]
    pipeline = rebuilt(pipeline_class, teacher.pipeline, **{teacher.family.denoiser_name: denoiser})
    pipeline.student = _student_config(teacher, scheduler, base_model_name_or_path=None, training=training or {})
    with replacing(folder) as new:
        pipeline.save_pretrained(new)


def copy_lora(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes a LoRA student's files again, from one folder into another, with weights of another precision.

    Raises:
        WritingError: for example on a full disk.
    """
    weights, header = read_lora(source)
    with writing(folder):
        save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, folder / LORA_FILE, header)
        copy_files(source, folder, ("scheduler/*.json",))
        student = replace(StudentConfig.load(str(source)), weights_sha256=digest_of_lora(folder / LORA_FILE))
        student.save(folder)
        _add_comfyui(folder, student.pipeline_class)


def write_full(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes a student as a whole stock pipeline of a precision; a LoRA is added to its base's weights in float32.

    Raises:
        WritingError: for example on a full disk.
    """
    pipeline = RdmDistillationPipeline.from_pretrained(source, dtype=torch.float32)
    denoiser = FAMILIES[StudentConfig.load(str(source)).pipeline_class].denoiser(pipeline)
    if getattr(denoiser, "peft_config", None):
        denoiser.fuse_lora()  # in place, because memory may not hold a large network twice
        denoiser.unload_lora()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module) and part.dtype != dtype:
            torch.nn.Module.to(part, dtype)  # diffusers' own `to` warns without cause of float32 modules
    with writing(folder):
        pipeline.save_pretrained(folder)


def _student_config(teacher: Teacher, scheduler: RdmScheduler, **origin) -> StudentConfig:
    revision = origin.get("revision") or origin.get("training", {}).get("arguments", {}).get("revision")
    return StudentConfig(
        pipeline_class=teacher.family.pipeline_class.__name__,
        scheduler={name: value for name, value in scheduler.config.items() if not name.startswith("_")},
        num_inference_steps=len(scheduler.timesteps),
        call_arguments={**teacher.family.unguided(teacher.pipeline, teacher.options), **teacher.call_options},
        license=license_of(teacher.name, revision),
        **origin,
    )
