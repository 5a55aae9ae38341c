"""What can be wrong with a run's arguments for its teacher, seen in its configurations before any weights are read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from ..bounds import did_you_mean
from ..config import LoraStudentConfig, RunConfig, TeacherConfig
from ..families import (
    Family,
    Teacher,
    check_lora,
    check_prediction,
    check_teacher,
    explain_hub_errors,
    family_of,
    few_step_warning,
    load_tiny_vae,
    parts_of,
    teacher_config,
)
from ..hub.push import check_repo_id
from ..tiny import resolve_teacher
from .assembly import lora_config, prompt_options, student_scheduler, teacher_shift
from .devices import prepare_denoiser, prepare_vae
from .lora_checks import check_loras
from .memory_model import meta_models, meta_pipeline
from .run_folder import make_writable

ADAPTED = (nn.Linear, nn.Conv2d, nn.Conv3d)  # the kinds of layers that a LoRA is made for
ANY_RANK = 64  # the default, which is never refused


def check_with_teacher(config: RunConfig) -> None:
    """Raises ValueError for what does not fit the teacher, or would fail late; a dry run skips what needs the GPU."""
    if config.hub.hub_model_id:
        check_repo_id(config.hub.hub_model_id)
    if config.prompts.cache_dir:
        make_writable(config.prompts.cache_dir, "--cache_dir")
    name, source = config.teacher.pretrained_model_name_or_path, config.teacher
    file, _, index = teacher_config(name, source.single_file_config, revision=source.revision)
    family = family_of(index)
    if file:
        parts_of(file, index, family, revision=source.revision)
    if config.is_lora:
        check_lora(family)
    if config.loras:
        check_loras(config, index, family)
    family.check_options(prompt_options(config))
    networks, scheduler = _on_meta(source, index, family)
    if {family.denoiser_name, "vae"} <= networks.keys():  # else loading says what is missing
        pipeline = meta_pipeline(family, networks)
        if scheduler is not None:
            pipeline.scheduler = scheduler
            check_teacher(name, pipeline, index, family)
            if file:
                check_prediction(file, family.prediction_type(scheduler))
            _warn(few_step_warning(name, index, scheduler, family.denoiser(pipeline).config))
            _check_steps(config, Teacher(pipeline, family, name))
        (channels, *_), *_ = [family.latent_shape(pipeline, size) for size in config.teacher.sizes]
        _check_decoder(config, family, pipeline, channels)
        _check_denoiser(config, family, family.denoiser(pipeline))


def _warn(sentence: str | None) -> None:
    if sentence:
        warnings.warn(sentence, stacklevel=2)


def _on_meta(
    source: TeacherConfig, index: dict[str, Any], family: Family
) -> tuple[dict[str, nn.Module], SchedulerMixin | None]:
    """The denoiser and the autoencoder on the meta device, and the scheduler; without those that are not there."""
    name, vae = source.configuration, source.pretrained_vae_model_name_or_path
    wanted = {part: index[part] for part in (family.denoiser_name, "vae") if part in index}
    try:
        with explain_hub_errors("teacher", name, source.revision):
            networks = meta_models(name, wanted, source.revision)
            _, class_name = index.get("scheduler") or (None, None)
            scheduler = getattr(diffusers, class_name or "", None)
            if scheduler is not None:
                settings = {"subfolder": "scheduler", "revision": source.revision}
                scheduler = scheduler.from_config(scheduler.load_config(resolve_teacher(name), **settings))
        if vae is not None and "vae" in networks:
            with explain_hub_errors("autoencoder", vae), torch.device("meta"), no_init_weights():
                kind: Any = type(networks["vae"])
                networks["vae"] = kind.from_config(kind.load_config(vae))
    except OSError as error:
        raise ValueError(f"The teacher {name} cannot be read: {str(error).splitlines()[0]}") from error
    return networks, scheduler


def _check_steps(config: RunConfig, teacher: Teacher) -> None:
    steps, times = config.method.num_student_steps, teacher.pipeline.scheduler.config.num_train_timesteps
    if steps > times:
        raise ValueError(
            f"--num_student_steps is {steps}; this teacher knows {times} times, so it must be at most that."
        )
    _check_times(config, teacher)
    try:
        student_scheduler(teacher, config)
    except ValueError as error:
        raise ValueError(
            f"--num_student_steps is {steps}, for which the stock scheduler of --eta {config.method.eta:g} lays no "
            "grid of as many times; choose another number, 1 to 8 is usual."
        ) from error


def _check_times(config: RunConfig, teacher: Teacher) -> None:
    own, is_flow, count = config.times, teacher.schedule.is_flow, teacher.schedule.num_train_timesteps
    if own.student_timesteps and is_flow:
        raise ValueError("--student_timesteps is for other teachers than this one of flow; give --student_sigmas.")
    if own.student_sigmas and not is_flow:
        raise ValueError("--student_sigmas is for teachers of flow, which this one is not; give --student_timesteps.")
    if max(own.student_timesteps, default=0) >= count:
        raise ValueError(
            f"--student_timesteps has {max(own.student_timesteps)}; this teacher knows {count} times, so each must be "
            f"below {count}."
        )
    for name in ("student_grid", "renoising_time_distribution", "fake_time_distribution"):
        if getattr(own, name) == "shifted" and teacher_shift(teacher, config) == 1:
            raise ValueError(f"--{name} shifted would have no effect, as this teacher has no shift; leave it out.")
    for name in ("guidance_interval", "guidance_range", "decoupled_guidance"):
        if getattr(own, name) and teacher.family.embeds_guidance(teacher.pipeline):
            raise ValueError(f"--{name} would have no effect: this teacher is guided inside its network; leave it out.")


def _check_decoder(config: RunConfig, family: Family, pipeline: DiffusionPipeline, channels: int) -> None:
    vae: Any = pipeline.vae
    prepare_vae(vae, config.memory)
    if config.rewards.reward_vae:
        vae = checked_tiny_vae(config.rewards.reward_vae, family, channels, pipeline.vae_scale_factor)
    if config.memory.gradient_checkpointing and config.rewards.reward and not vae._supports_gradient_checkpointing:
        print(
            f"warning: {type(vae).__name__} has no gradient checkpointing, so --gradient_checkpointing does not lower "
            "the memory of decoding for rewards; --decode_batch_size does."
        )


def checked_tiny_vae(name: str, family: Family, channels: int, factor: int) -> ModelMixin:
    """The `AutoencoderTiny` of `--reward_vae`, if it can decode the teacher's latents.

    Args:
        name: a folder or a Hub id.
        family: the teacher's.
        channels: of its latents.
        factor: by how much its pictures are wider than the latents.

    Raises:
        ValueError: if it is another kind of network or made for other latents, or if it cannot be loaded.
    """
    if not family.has_tiny_vae:
        raise ValueError(
            f"--reward_vae {name} cannot decode here, because a {family.pipeline_class.__name__} takes no "
            "AutoencoderTiny; leave it out."
        )
    try:
        with explain_hub_errors("autoencoder", name):
            kind = AutoencoderTiny.load_config(name).get("_class_name")
    except OSError as error:
        raise ValueError(f"--reward_vae {name} cannot be read: {str(error).splitlines()[0]}") from error
    if kind != AutoencoderTiny.__name__:
        raise ValueError(f"--reward_vae {name} holds a network of the class {kind}; give an AutoencoderTiny.")
    vae = load_tiny_vae(name, torch.float32)
    own = vae.config.upsampling_scaling_factor ** (len(vae.config.decoder_block_out_channels) - 1)
    if (vae.config.latent_channels, own) != (channels, factor):
        raise ValueError(
            f"--reward_vae {name} turns latents of {vae.config.latent_channels} channels into pictures {own} times as "
            f"wide; this teacher's have {channels} channels and become {factor} times as wide, so give one that was "
            "made for its autoencoder."
        )
    return vae


def _check_denoiser(config: RunConfig, family: Family, denoiser: ModelMixin) -> None:
    memory, student = config.memory, config.student
    if not config.output.dry_run and (memory.attention_backend or memory.enable_xformers_memory_efficient_attention):
        prepare_denoiser(denoiser, memory, family)
    if isinstance(student, LoraStudentConfig):
        layers = lora_config(family, student)
        check_layers(denoiser, sorted(layers.target_modules), student.rank, bool(student.lora_layers))
        layers.init_lora_weights = False  # there is nothing to fill
        try:
            with torch.device("meta"), no_init_weights():
                denoiser.add_adapter(layers)
        except ValueError as error:
            raise ValueError(f"--lora_layers or --rank cannot be had: {str(error).splitlines()[0]}") from error


def check_layers(denoiser: nn.Module, names: Sequence[str], rank: int, all_there: bool = True) -> None:
    """Refuses names of layers that a network does not have, and ranks that none of those layers can hold.

    Args:
        denoiser: the network; the meta device is enough.
        names: of modules, each whole or its end behind a dot, as peft matches them.
        rank: of a LoRA.
        all_there: whether each name must be that of a layer; a family's own names serve all of its networks.

    Raises:
        ValueError: naming the layers that are not there, those that are like them, and all that are there.
    """
    layers = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, ADAPTED)}
    found = {name: [layer for key, layer in layers.items() if f".{key}".endswith(f".{name}")] for name in names}
    kind = type(denoiser).__name__
    missing = [name for name in names if not name or not found[name]]
    if missing and all_there:
        ends = {".".join(key.split(".")[start:]) for key in layers for start in range(key.count(".") + 1)}
        named = ", ".join((name or "an empty name") + did_you_mean(name, ends) for name in missing)
        raise ValueError(
            f"--lora_layers names {named}, which no linear or convolutional layer of this {kind} is called; it has "
            f"{', '.join(sorted({_short(key) for key in layers}))}."
        )
    shapes = [layer.get_parameter("weight").shape for name in names for layer in found[name]]
    most = max([ANY_RANK, *(min(outputs, math.prod(inputs)) for outputs, *inputs in shapes)])
    if rank > most:
        raise ValueError(f"--rank is {rank}; no adapted layer of this {kind} holds more, so it must be at most {most}.")


def _short(name: str) -> str:
    """A layer's name in its block, with the owner's where it is a number: `to_q`, `to_out.0`."""
    *_, last = parts = name.split(".")
    return ".".join(parts[-2:]) if last.isdecimal() else last
