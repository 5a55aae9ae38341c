"""Loads teachers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from ..prediction import NoiseSchedule
from ..tiny import MAX_SEQUENCE_LENGTHS, is_tiny, resolve_teacher
from ..untrusted import read_object
from .base import INDEX, STUDENT_CONFIG, Conditioning, Family, PromptOptions
from .hub_files import explain_hub_errors, fetch, repository_files
from .loras import Lora, LoraLayers, fuse_loras
from .quantization import quantized_loading
from .registry import FAMILIES, family_of
from .suitability import check_folder, check_index, check_teacher
from .weights import check_files, check_network, check_weights, files_in, networks_of, problem_in, quiet, refuse

INDEX_REMEDY = "save or download it again"
DEFAULT_OPTIONS = PromptOptions()


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher: the stock pipeline, frozen, with its family.

    Args:
        pipeline: the stock pipeline.
        family: how it is used.
        name: the folder, Hub id or embedded teacher's name that it was loaded by.
        options: how prompts are read, by teacher and student alike.
        vae: the folder or Hub id of the autoencoder, if it is not the teacher's own.
        loras: those that are in its weights.
        lora_layers: what they added to the denoiser.
    """

    pipeline: DiffusionPipeline
    family: Family
    name: str
    options: PromptOptions = DEFAULT_OPTIONS
    vae: str | None = None
    loras: Sequence[Lora] = ()
    lora_layers: LoraLayers = field(default_factory=dict, compare=False)

    @property
    def denoiser(self) -> ModelMixin:
        """The network that is distilled."""
        return self.family.denoiser(self.pipeline)

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        """The networks that read prompts."""
        return list(self._text_encoders.values())

    @property
    def _text_encoders(self) -> dict[str, torch.nn.Module]:
        components = self.pipeline.components.items()
        return {name: part for name, part in components if name.startswith("text_encoder") and part is not None}

    def drop_text_encoders(self) -> None:
        """Takes the text encoders out of the pipeline, which frees their memory; no more prompts can be encoded."""
        self.pipeline.register_modules(**dict.fromkeys(self._text_encoders))

    @property
    def schedule(self) -> NoiseSchedule:
        """The teacher's noise schedule."""
        return schedule_of(self.family, self.pipeline.scheduler)

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts, one of `prediction.PREDICTION_TYPES`."""
        return self.family.prediction_type(self.pipeline.scheduler)

    @property
    def call_options(self) -> dict[str, Any]:
        """Arguments with which the stock pipeline reads prompts as `encode_prompts` does."""
        return self.family.call_options(self.options)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> conditioning of length B, on the text encoders' device. No gradients."""
        return self.family.encode_prompts(self.pipeline, prompts, self.options)

    def encode_nothing(self) -> Conditioning:
        """What guidance steers away from, of length 1. No gradients."""
        return self.family.encode_nothing(self.pipeline, self.options)


def options_for(name_or_path: str, options: PromptOptions) -> PromptOptions:
    """The options, by default with the number of tokens that an embedded teacher was trained with."""
    length = options.max_sequence_length or MAX_SEQUENCE_LENGTHS.get(name_or_path)
    return replace(options, max_sequence_length=length)


def schedule_of(family: Family, scheduler: SchedulerMixin) -> NoiseSchedule:
    """The noise schedule of a family's teacher with this scheduler."""
    if family.prediction_type(scheduler) == "flow_prediction":  # some flow schedulers have betas, too
        return NoiseSchedule(None, scheduler.config.num_train_timesteps)
    return NoiseSchedule.from_scheduler(scheduler)


def load_scheduler(what: str, name_or_path: str, config: dict[str, Any], **hub_options) -> SchedulerMixin:
    """A pipeline's scheduler alone. Raises ValueError if it cannot be downloaded."""
    with explain_hub_errors(what, name_or_path, hub_options.get("revision")):
        kind = getattr(diffusers, config["scheduler"][1])
        return kind.from_pretrained(resolve_teacher(name_or_path), subfolder="scheduler", **hub_options)


def full_name(name_or_path: str) -> str:
    """A local folder's absolute path; the name of an embedded teacher or a Hub id unchanged."""
    is_folder = not is_tiny(name_or_path) and Path(name_or_path).is_dir()
    return str(Path(name_or_path).resolve()) if is_folder else name_or_path


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
) -> ModelMixin:
    """Another copy of a teacher's denoiser alone, on the CPU; arguments as in `load_teacher`."""
    config = pipeline_config(name_or_path, revision=revision)
    component = family_of(config).denoiser_name
    options = {"revision": revision, "variant": variant, "dtype": dtype, "use_safetensors": True}
    if quantization:
        options |= quantized_loading(quantization, dtype, device)
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
) -> Teacher:
    """Loads a teacher from a folder, from the Hub, or an embedded one by its name; safetensors only.

    Args:
        name_or_path: a folder, a Hub id, or the name of an embedded teacher.
        dtype: of its weights.
        revision, variant: of a Hub repository.
        options: how it reads prompts; see `options_for`.
        vae: another autoencoder than the teacher's, a folder or a Hub id.
        quantization: one of `QUANTIZATIONS` for the denoiser; None leaves it in `dtype`.
        device: where bitsandbytes quantises it; it is on the CPU afterwards in any case.
        loras: are added to the weights of denoiser and text encoders; not to quantised ones.

    Raises:
        ValueError: as `pipeline_config`, `family_of`, `check_index`, `check_pipeline`, `check_teacher`,
            `quantized_loading` and `fuse_loras`.
        ImportError: if the library that quantises is missing.
    """
    if (Path(resolve_teacher(name_or_path)) / STUDENT_CONFIG).exists():
        raise ValueError(f"{name_or_path} is a few-step student already; give the teacher that it was distilled from.")
    config = pipeline_config(name_or_path, revision=revision)
    family = family_of(config)
    check_index(name_or_path, config)
    check_pipeline("teacher", name_or_path, config, [] if vae is None else ["vae"], revision=revision, variant=variant)
    replaced = {} if vae is None else {"vae": load_vae(vae, config, dtype)}
    if quantization:
        replaced[family.denoiser_name] = load_denoiser(name_or_path, dtype, revision, variant, quantization, device)
    loading = {"revision": revision, "variant": variant, "dtype": dtype, **load_options(config), **replaced}
    pipeline = family.pipeline_class.from_pretrained(resolve_teacher(name_or_path), **loading)
    check_teacher(name_or_path, pipeline)
    lora_layers = fuse_loras(pipeline, family, loras)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    if not family.embeds_guidance(pipeline):
        options = replace(options, embedded_guidance=None)
    return Teacher(pipeline, family, name_or_path, options_for(name_or_path, options), vae, loras, lora_layers)
