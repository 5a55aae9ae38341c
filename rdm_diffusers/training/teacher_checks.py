"""What can be wrong with a run's arguments for its teacher, seen in its configurations before any weights are read."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from ..bounds import did_you_mean
from ..families import Family, Teacher, check_lora, coming_from_hub, family_of, pipeline_config
from ..hub.push import check_repo_id
from ..tiny import resolve_teacher
from .memory_model import meta_models, meta_pipeline
from .setup import lora_config, make_scheduler, prompt_options
from .speed import prepare_denoiser

ADAPTED = (nn.Linear, nn.Conv2d, nn.Conv3d)  # the kinds of layers that a LoRA is made for
ANY_RANK = 64  # the default, which is never refused


def check_with_teacher(args: argparse.Namespace) -> None:
    """Checks what depends on the teacher, and what else is found out late; a dry run leaves out what hangs on the GPU.

    Raises:
        ValueError: one sentence on what is wrong and what to do.
    """
    if args.hub_model_id:
        check_repo_id(args.hub_model_id)
    if args.cache_dir:
        _check_writable(args.cache_dir)
    name = args.pretrained_model_name_or_path
    config = pipeline_config(name, revision=args.revision)
    family = family_of(config)
    if args.student == "lora":
        check_lora(family)
    family.check_options(prompt_options(args))
    networks, scheduler = _on_meta(args, config, family)
    if {family.denoiser_name, "vae"} <= networks.keys():  # else loading says what is missing
        pipeline = meta_pipeline(family, networks)
        if scheduler is not None:
            pipeline.scheduler = scheduler
            _check_steps(args, Teacher(pipeline, family, name))
        family.latent_shape(pipeline, args.resolution)  # refuses a resolution that the teacher does not have
        _check_denoiser(args, family, family.denoiser(pipeline))


def _check_writable(cache_dir: str) -> None:
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir):
            pass
    except OSError as error:
        raise ValueError(f"--cache_dir {cache_dir} cannot be written ({error.strerror}); choose another.") from error


def _on_meta(
    args: argparse.Namespace, config: dict[str, Any], family: Family
) -> tuple[dict[str, nn.Module], SchedulerMixin | None]:
    """The denoiser and the autoencoder on the meta device, and the scheduler; without those that are not there."""
    name, vae = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    wanted = {part: config[part] for part in (family.denoiser_name, "vae") if part in config}
    try:
        with coming_from_hub("teacher", name, args.revision):
            networks = meta_models(name, wanted, args.revision)
            scheduler = _scheduler(name, config, args.revision)
        if vae is not None and "vae" in networks:
            with coming_from_hub("autoencoder", vae), torch.device("meta"), no_init_weights():
                kind: Any = type(networks["vae"])
                networks["vae"] = kind.from_config(kind.load_config(vae))
    except OSError as error:
        raise ValueError(f"The teacher {name} cannot be read: {str(error).splitlines()[0]}") from error
    return networks, scheduler


def _scheduler(name: str, config: dict[str, Any], revision: str | None) -> SchedulerMixin | None:
    _, class_name = config.get("scheduler") or (None, None)
    kind = getattr(diffusers, class_name or "", None)
    settings = {"subfolder": "scheduler", "revision": revision}
    return None if kind is None else kind.from_config(kind.load_config(resolve_teacher(name), **settings))


def _check_steps(args: argparse.Namespace, teacher: Teacher) -> None:
    steps, times = args.num_student_steps, teacher.pipeline.scheduler.config.num_train_timesteps
    if steps > times:
        raise ValueError(
            f"--num_student_steps is {steps}; this teacher knows {times} times, so it must be at most that."
        )
    try:
        make_scheduler(teacher, steps, args.eta)
    except ValueError as error:
        raise ValueError(
            f"--num_student_steps is {steps}, for which the stock scheduler of --eta {args.eta:g} lays no grid of as "
            "many times; choose another number, 1 to 8 is usual."
        ) from error


def _check_denoiser(args: argparse.Namespace, family: Family, denoiser: ModelMixin) -> None:
    if not args.dry_run and (args.attention_backend or args.enable_xformers_memory_efficient_attention):
        prepare_denoiser(denoiser, args)
    if args.student == "lora":
        layers = lora_config(family, args)
        check_layers(denoiser, sorted(layers.target_modules), args.rank, bool(args.lora_layers))
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
        ends = {end for key in layers for end in _ends(key)}
        named = ", ".join((name or "an empty name") + did_you_mean(name, ends) for name in missing)
        raise ValueError(
            f"--lora_layers names {named}, which no linear or convolutional layer of this {kind} is called; it has "
            f"{', '.join(sorted({_short(key) for key in layers}))}."
        )
    most = max([ANY_RANK, *(_capacity(layer) for name in names for layer in found[name])])
    if rank > most:
        raise ValueError(f"--rank is {rank}; no adapted layer of this {kind} holds more, so it must be at most {most}.")


def _ends(name: str) -> Iterable[str]:
    """`a.b.c`, `b.c` and `c`."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _short(name: str) -> str:
    """What a layer is called in its block, with the number's owner where it is numbered: `to_q`, `to_out.0`."""
    *_, last = parts = name.split(".")
    return ".".join(parts[-2:]) if last.isdecimal() else last


def _capacity(layer: nn.Module) -> int:
    """The highest rank that a change of the layer's weight can have."""
    outputs, *inputs = layer.get_parameter("weight").shape
    return min(outputs, math.prod(inputs))
