"""Loads teachers."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin

from ..tiny import is_tiny, resolve_teacher
from ..untrusted import read_object
from .base import INDEX, STUDENT_CONFIG
from .conditioning import PromptOptions
from .hub_files import explain_hub_errors, fetch, repository_files
from .loras import Lora, fuse_loras
from .quantization import quantised_copy, quantized_loading
from .registry import FAMILIES, family_of
from .single_file import FLAG, SingleFile
from .single_file_parts import check_prediction, load_parts, parts_of, rest_of
from .suitability import check_folder, check_teacher
from .teacher import DEFAULT_OPTIONS, Teacher, options_for
from .weights import check_files, check_network, check_weights, files_in, networks_of, problem_in, quiet, refuse

INDEX_REMEDY = "save or download it again"


def load_scheduler(what: str, name_or_path: str, config: dict[str, Any], **hub_options) -> SchedulerMixin:
    """A pipeline's scheduler alone. Raises ValueError if it cannot be downloaded."""
    with explain_hub_errors(what, name_or_path, hub_options.get("revision")):
        kind = getattr(diffusers, config["scheduler"][1])
        return kind.from_pretrained(resolve_teacher(name_or_path), subfolder="scheduler", **hub_options)


def full_name(name_or_path: str) -> str:
    """The absolute path of a local folder or file; the name of an embedded teacher or a Hub id unchanged."""
    if is_tiny(name_or_path) or not Path(name_or_path).exists():
        return name_or_path
    # A file in the Hub's cache is a link, and what it leads to has no suffix.
    return os.path.abspath(name_or_path) if Path(name_or_path).is_file() else str(Path(name_or_path).resolve())


def teacher_config(
    name_or_path: str, single_file_config: str | None = None, **hub_options
) -> tuple[SingleFile | None, str, dict[str, Any]]:
    """A teacher's single file, if it is one; the folder or Hub id of its configuration; and its `pipeline_config`.

    Raises:
        ValueError: as `SingleFile.of` and `pipeline_config`.
    """
    file = SingleFile.of(name_or_path, single_file_config, **hub_options)
    if file is None:
        return None, name_or_path, pipeline_config(name_or_path, **hub_options)
    try:
        return file, file.config, pipeline_config(file.config, **hub_options)
    except ValueError as error:
        raise ValueError(
            f"The single file {name_or_path} needs the configuration of a pipeline of its kind, and {file.config} was "
            f"not read: {str(error).rstrip('.')}. Another is given with {FLAG}."
        ) from error


def pipeline_config(name_or_path: str, **hub_options) -> dict[str, Any]:
    """The contents of a teacher's `model_index.json`.

    Raises:
        ValueError: if a local folder is missing, is a LoRA, or is not a diffusers pipeline; if it cannot be downloaded.
    """
    folder = Path(resolve_teacher(name_or_path))
    check_folder(name_or_path, folder)
    path = folder / INDEX if folder.is_dir() else fetch("teacher", name_or_path, INDEX, **hub_options)
    config = read_object(path, INDEX_REMEDY, finite=False)
    if not _names_classes(config):
        raise ValueError(f"{path} is damaged (it does not name classes); {INDEX_REMEDY}.")
    return config


def _names_classes(config: dict[str, Any]) -> bool:
    """Whether a `model_index.json` has valid names: of the pipeline's class, and of the needed components' classes."""
    entries = {name: entry for name, entry in config.items() if isinstance(entry, list) and len(entry) == 2}
    classes = {name: entry[1] for name, entry in entries.items() if isinstance(entry[0], str)}
    names = [config.get("_class_name"), *entries, *classes.values()]
    if not all(isinstance(name, str) and name.isidentifier() for name in names):
        return False
    family = FAMILIES.get(config["_class_name"])
    return family is None or {family.denoiser_name, "vae"} <= classes.keys()


def absent_components(config: dict[str, Any]) -> dict[str, None]:
    """Components that a pipeline was saved without, for example `{"text_encoder_3": None}`.

    `from_pretrained` must be given these, unless the class declares them optional.
    """
    optional = family_of(config).pipeline_class._optional_components
    entries = {name: entry for name, entry in config.items() if isinstance(entry, list | tuple) and len(entry) == 2}
    return {name: None for name, entry in entries.items() if entry[0] is None and name not in optional}


def load_options(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the pipeline of a `pipeline_config`; never pickled weights."""
    return {"use_safetensors": True, **family_of(config).load_options, **absent_components(config)}


def check_pipeline(
    what: str, name_or_path: str, config: dict[str, Any], without: Collection[str] = (), **options: Any
) -> None:
    """Refuses a pipeline with weights that are missing, pickled, damaged or of another network; downloads it first.

    Args:
        what: `teacher` or `student`, for the error's sentence.
        name_or_path: a folder, a Hub id, or the name of an embedded teacher.
        config: its `pipeline_config`.
        without: components that are not loaded from there; other names do not matter.
        options: `variant`, and the Hub's.

    Raises:
        ValueError: naming the component, or if it cannot be downloaded.
    """
    folder, variant = Path(resolve_teacher(name_or_path)), options.pop("variant", None)
    replaced = {name: None for name in networks_of(config) if name in without} | load_options(config)
    if not folder.is_dir():
        check_kinds_of_files(what, name_or_path, config, variant, without, **options)
        pipeline_class = family_of(config).pipeline_class
        with explain_hub_errors(what, name_or_path, options.get("revision")):
            folder = Path(pipeline_class.download(name_or_path, variant=variant, **options, **replaced))
    check_weights(what, name_or_path, config, folder, variant, replaced)


def check_kinds_of_files(
    what: str, name_or_path: str, config: dict[str, Any], variant: str | None, without: Collection[str] = (), **hub: Any
) -> None:
    """As `check_pipeline`, but by file names alone: nothing is downloaded, and offline nothing is checked."""
    folder = Path(resolve_teacher(name_or_path))
    files = files_in(folder) if folder.is_dir() else repository_files(name_or_path, **hub)
    networks = networks_of(config).keys() - {*without, *load_options(config)}
    check_files(what, name_or_path, sorted(networks), files, variant, complete=False)


def load_vae(name_or_path: str, config: dict[str, Any], dtype: torch.dtype, **hub_options) -> ModelMixin:
    """An autoencoder of the class that the `pipeline_config` names, from a folder or the Hub.

    Raises:
        ValueError: if it cannot be downloaded, or if its weights are missing, damaged or of another network.
    """
    options = {"use_safetensors": True, "dtype": dtype, **hub_options}
    kind, name = getattr(diffusers, config["vae"][1]), f"autoencoder {name_or_path}"
    if Path(name_or_path).is_dir():
        check_network(name, "network", kind, Path(name_or_path))
    with explain_hub_errors("autoencoder", name_or_path):
        vae, info = kind.from_pretrained(name_or_path, output_loading_info=True, **options)
    refuse(name, "network", problem_in(kind, info))
    return vae


def load_tiny_vae(name_or_path: str, dtype: torch.dtype) -> ModelMixin:
    """An `AutoencoderTiny` from a folder or the Hub, frozen. Raises ValueError as `load_vae`."""
    with quiet():  # about a setting that diffusers itself saves
        return load_vae(name_or_path, {"vae": ("diffusers", "AutoencoderTiny")}, dtype).requires_grad_(False)


def load_denoiser(
    name_or_path: str,
    dtype: torch.dtype,
    revision: str | None = None,
    variant: str | None = None,
    quantization: str | None = None,
    device: torch.device | str = "cpu",
    single_file_config: str | None = None,
) -> ModelMixin:
    """Another copy of a teacher's denoiser alone, on the CPU; arguments as in `load_teacher`."""
    file, _, config = teacher_config(name_or_path, single_file_config, revision=revision)
    component = family_of(config).denoiser_name
    quantized = quantized_loading(quantization, dtype, device) if quantization else {}
    if file:
        own: Any = load_parts(file, config, [component], dtype, revision=revision)[component]
        return quantised_copy(own, dtype, quantized).to("cpu") if quantized else own
    options = {"revision": revision, "variant": variant, "dtype": dtype, "use_safetensors": True, **quantized}
    kind = getattr(diffusers, config[component][1])
    return kind.from_pretrained(resolve_teacher(name_or_path), subfolder=component, **options).to("cpu")


def load_teacher(
    name_or_path: str,
    dtype: torch.dtype,
    revision: str | None = None,
    variant: str | None = None,
    options: PromptOptions = DEFAULT_OPTIONS,
    vae: str | None = None,
    quantization: str | None = None,
    device: torch.device | str = "cpu",
    loras: Sequence[Lora] = (),
    single_file_config: str | None = None,
) -> Teacher:
    """Loads a teacher from a folder, from the Hub, from a single file, or an embedded one; safetensors only.

    Args:
        name_or_path: a folder, a Hub id, a single file as `SingleFile` names it, or the name of an embedded teacher.
        dtype: of its weights.
        revision, variant: of a Hub repository.
        options: how it reads prompts; see `options_for`.
        vae: another autoencoder than the teacher's, a folder or a Hub id.
        quantization: one of `QUANTIZATIONS` for the denoiser; None leaves it in `dtype`.
        device: where bitsandbytes quantises it; it is on the CPU afterwards in any case.
        loras: are added to the weights of denoiser and text encoders; not to quantised ones.
        single_file_config: the folder or Hub id with the configuration of a single file, and with the networks that it
            lacks; by default what its keys say.

    Raises:
        ValueError: as `teacher_config`, `family_of`, `parts_of`, `check_pipeline`, `check_teacher`,
            `quantized_loading` and `fuse_loras`.
        ImportError: if the library that quantises is missing.
    """
    if (Path(resolve_teacher(name_or_path)) / STUDENT_CONFIG).exists():
        raise ValueError(f"{name_or_path} is a few-step student already; give the teacher that it was distilled from.")
    file, origin, config = teacher_config(name_or_path, single_file_config, revision=revision)
    family, options = family_of(config), options_for(origin, options)
    own = parts_of(file, config, family, revision=revision) if file else []
    without = [*own, *([] if vae is None else ["vae"])]
    origin = rest_of(file, config, without, revision=revision) if file else origin
    check_pipeline("teacher", origin, config, without, revision=revision, variant=variant)
    replaced: dict[str, Any] = {} if vae is None else {"vae": load_vae(vae, config, dtype)}
    if quantization:
        same = (name_or_path, dtype, revision, variant, quantization, device, single_file_config)
        replaced[family.denoiser_name] = load_denoiser(*same)
    if file:
        replaced |= load_parts(file, config, [name for name in own if name not in replaced], dtype, revision=revision)
    loading = {"revision": revision, "variant": variant, "dtype": dtype, **load_options(config), **replaced}
    pipeline = family.pipeline_class.from_pretrained(resolve_teacher(origin), **loading)
    check_teacher(name_or_path, pipeline, config, family)
    if file:
        check_prediction(file, family.prediction_type(pipeline.scheduler))
    lora_layers = fuse_loras(pipeline, family, loras)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    if not family.embeds_guidance(pipeline):
        options = replace(options, embedded_guidance=None)
    return Teacher(pipeline, family, name_or_path, options, vae, loras, lora_layers, file, own)
