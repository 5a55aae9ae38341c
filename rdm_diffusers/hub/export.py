"""Writes a student as files that stock diffusers loads, and that our pipeline loads with its trained settings.

A new student replaces an older one as a whole or not at all, even if the process is killed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..families import FAMILIES, LORA_FILE, STUDENT_CONFIG, Teacher, full_name, rebuilt
from ..folders import aside, clear_aside, sync, sync_tree
from ..pipelines import CLASSES, RdmDistillationPipeline, StudentConfig, stock_scheduler
from ..pipelines.lora_file import digest_of_lora
from ..schedulers import RdmScheduler
from ..untrusted import digest_of
from .card_text import license_of
from .comfyui import comfyui_name, has_comfyui, read_lora, write_comfyui
from .joined_lora import join_loras
from .student_files import copy_files, read_scheduler

COMFYUI_FOLDER = "comfyui"  # in a LoRA student's
READY, REPLACED = "ready", "replaced"  # in the hidden folder: the whole new student, and the files that it replaces
RESULTS = ("samples.png", "pictures", "metrics.json", "evaluation.json")  # they show the older student


class WritingError(OSError):
    """A student could not be written; the system's own error is its cause."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises WritingError, with what to do, if a student cannot be written, for example on a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WritingError(
            f"The student could not be written to {folder} ({error}); its checkpoints are intact. Free some space and "
            "resume with --resume_from_checkpoint latest, which finishes the training and writes it again."
        ) from error


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder of the same name, whose contents replace the student in `folder` at the end.

    They are written aside and synced; until then the older student stays whole. Other files in the folder stay. A kill
    while they are moved leaves a folder that is no student, and the whole new one in a hidden folder, from which
    `finish_exports` continues.

    Raises:
        WritingError: for example on a full disk; the older student is unchanged then.
    """
    with writing(folder):
        finish_exports(folder)
        with aside(folder) as hidden:
            new = hidden / "new" / (folder.resolve().name or "student")  # files are named after it
            new.mkdir(parents=True)
            yield new
            sync_tree(new)
            new.rename(hidden / READY)
            try:
                _move_in(hidden, folder)
            except BaseException:  # as Ctrl-C raises it
                _move_in(hidden, folder)
                raise


def finish_exports(folder: Path) -> None:
    """Completes the replacements that killed processes had begun, and removes what they left half written."""
    clear_aside(folder, lambda hidden: _move_in(hidden, folder))


def _move_in(hidden: Path, folder: Path) -> None:
    """Moves a whole student into its place, from wherever a kill stopped the move."""
    ready, replaced = hidden / READY, hidden / REPLACED
    if not (ready / STUDENT_CONFIG).exists():  # it goes last
        return
    replaced.mkdir(exist_ok=True)
    for name in (STUDENT_CONFIG, *RESULTS):  # first, so that a mixture is no student
        _move_out(folder / name, replaced)
    for path in sorted(ready.iterdir(), key=lambda path: path.name == STUDENT_CONFIG):
        _move_out(folder / path.name, replaced)
        path.rename(folder / path.name)
    sync(folder)


def _move_out(path: Path, replaced: Path) -> None:
    """Moves a file or folder of the older student away, if it exists."""
    if path.is_symlink() or path.exists():
        target = replaced / path.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        path.replace(target)


def export_lora(
    folder: Path,
    teacher: Teacher,
    weights: Mapping[str, Tensor],
    scheduler: RdmScheduler,
    student_base: str = "plain",
    **origin,
) -> None:
    """Writes `pytorch_lora_weights.safetensors`, `scheduler/`, `rdm_config.json`, and if possible a file for ComfyUI.

    Args:
        folder: an existing folder; an older student in it is replaced, as a whole or not at all.
        teacher: the teacher that the LoRA belongs to, with its adapters.
        weights: the student's (`Networks.student_weights`).
        scheduler: the student's sampler with its trained grid.
        student_base: `plain` makes the teacher's own LoRAs part of the file; with `teacher` users load them, too.
        origin: `revision` and `variant` of the teacher, if any; `training`, as in `StudentConfig`.

    Raises:
        WritingError: for example on a full disk.
    """
    family, component = teacher.family, teacher.family.denoiser_name
    stock = stock_scheduler(scheduler, family, teacher.pipeline.scheduler)
    names: dict[str, Any] = {"base_model_name_or_path": full_name(teacher.name)}
    names["vae"] = teacher.vae and full_name(teacher.vae)
    if teacher.file:
        names["base_file"] = {
            "config": full_name(teacher.file.config),
            "sha256": teacher.file.digest(),
            "parts": list(teacher.file_parts),
        }
    adapter = teacher.denoiser.peft_config["default"]
    if teacher.lora_layers and student_base == "plain":
        weights, adapter = join_loras(teacher.denoiser, teacher.lora_layers, weights, adapter)
    elif teacher.loras:
        origin["base_loras"] = [
            {"name": each.exact().name, "scale": each.scale, "sha256": each.digest()} for each in teacher.loras
        ]
    with replacing(folder) as new:
        layers = {f"{component}_lora_layers": dict(weights)}
        described = {f"{component}_lora_adapter_metadata": adapter.to_dict()}
        family.pipeline_class.save_lora_weights(new, **layers, **described)
        stock.save_pretrained(new / "scheduler")
        names["weights_sha256"] = digest_of_lora(new / LORA_FILE)
        names["scheduler_sha256"] = digest_of(read_scheduler(new))
        _student_config(teacher, scheduler, **names, **origin).save(new)
        _add_comfyui(new, family.pipeline_class.__name__, teacher.denoiser.config)


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
    """Copies a LoRA student into another folder, with weights in a dtype. Raises WritingError, as on a full disk."""
    weights, header = read_lora(source)
    with writing(folder):
        save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, folder / LORA_FILE, header)
        copy_files(source, folder, ("scheduler/*.json",))
        student = replace(StudentConfig.load(str(source)), weights_sha256=digest_of_lora(folder / LORA_FILE))
        student.save(folder)
        _add_comfyui(folder, student.pipeline_class)


def write_full(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes a student as a whole stock pipeline in a dtype; a LoRA is added to its base's weights in float32.

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


def _add_comfyui(folder: Path, pipeline_class: str, config: Mapping | None = None) -> None:
    """Writes `comfyui/<folder's name>.safetensors`, in a subfolder where `load_lora_weights` does not find it."""
    if has_comfyui(pipeline_class):
        write_comfyui(folder, folder / COMFYUI_FOLDER / comfyui_name(folder), pipeline_class, config=config)


def _student_config(teacher: Teacher, scheduler: RdmScheduler, **origin) -> StudentConfig:
    revision = origin.get("revision") or origin.get("training", {}).get("arguments", {}).get("revision")
    file = teacher.file
    origin_of_license = (file.repository or file.name, None) if file else (teacher.name, revision)
    return StudentConfig(
        pipeline_class=teacher.family.pipeline_class.__name__,
        scheduler={name: value for name, value in scheduler.config.items() if not name.startswith("_")},
        num_inference_steps=len(scheduler.timesteps),
        call_arguments={**teacher.family.unguided(teacher.pipeline, teacher.options), **teacher.call_options},
        license=license_of(*origin_of_license),
        **origin,
    )
