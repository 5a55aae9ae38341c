"""Finds the family of a teacher, and loads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin

from ..prediction import NoiseSchedule
from ..tiny import MAX_SEQUENCE_LENGTHS, resolve_teacher
from .base import Conditioning, Family
from .sd3 import StableDiffusion3Family
from .sd_unet import StableDiffusionFamily

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": StableDiffusionFamily(),
    "StableDiffusion3Pipeline": StableDiffusion3Family(),
}
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher: the stock pipeline, frozen, and what its family knows about it.

    Args:
        pipeline: the stock pipeline.
        family: how it is used.
        name: what it was loaded by.
        max_sequence_length: tokens of the large text encoder, for teacher and student alike; None for the stock
            pipeline's own number.
    """

    pipeline: DiffusionPipeline
    family: Family
    name: str
    max_sequence_length: int | None = None

    @property
    def denoiser(self) -> ModelMixin:
        """The network that is distilled."""
        return self.family.denoiser(self.pipeline)

    @property
    def schedule(self) -> NoiseSchedule:
        """The teacher's noise schedule."""
        return NoiseSchedule.from_scheduler(self.pipeline.scheduler)

    @property
    def prediction_type(self) -> str:
        """What the denoiser's output means, one of `prediction.PREDICTION_TYPES`."""
        return self.pipeline.scheduler.config.get("prediction_type", "flow_prediction")

    @property
    def call_options(self) -> dict[str, Any]:
        """What the stock pipeline must be called with to read prompts as `encode_prompts` does."""
        return {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts (length B) -> conditioning of length B, on the pipeline's device. No gradients."""
        return self.family.encode_prompts(self.pipeline, prompts, self.max_sequence_length)


def pipeline_config(name_or_path: str, **hub_options) -> dict[str, Any]:
    """What a teacher's `model_index.json` holds.

    Raises:
        ValueError: if a local folder is missing, is a LoRA, or is not a diffusers pipeline.
    """
    folder = Path(resolve_teacher(name_or_path))
    if folder.is_dir() and not (folder / "model_index.json").exists():
        if (folder / LORA_FILE).exists():
            raise ValueError(f"{name_or_path} is a LoRA, not a teacher; give the model that it was trained on.")
        raise ValueError(f"{name_or_path} has no model_index.json; give a folder that a diffusers pipeline saved.")
    if not folder.is_dir() and (folder.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1):
        raise ValueError(f"The teacher folder {name_or_path} does not exist; check the path or give a Hub model id.")
    try:
        return DiffusionPipeline.load_config(resolve_teacher(name_or_path), **hub_options)
    except OSError as error:
        if folder.is_dir():
            raise ValueError(f"{folder}/model_index.json is damaged; save or download the teacher again.") from error
        raise ValueError(
            f"The teacher {name_or_path!r} is no local folder and could not be had from the Hub; check its name and "
            "your connection, and log in with `hf auth login` if it is gated."
        ) from error


def family_of(config: dict[str, Any]) -> Family:
    """The family that knows the pipeline class of a `pipeline_config`.

    Raises:
        ValueError: for a class that no family knows.
    """
    class_name = config["_class_name"]
    if class_name not in FAMILIES:
        raise ValueError(f"Teachers of class {class_name} are not supported; supported are {', '.join(FAMILIES)}.")
    return FAMILIES[class_name]


def absent_components(config: dict[str, Any]) -> dict[str, None]:
    """Components that a pipeline was saved without, for example `{"text_encoder_3": None}`.

    `from_pretrained` does without them only if it is told so, unless the class calls them optional.
    """
    optional = family_of(config).pipeline_class._optional_components
    entries = {name: entry for name, entry in config.items() if isinstance(entry, list | tuple)}
    return {name: None for name, entry in entries.items() if entry[0] is None and name not in optional}


def load_options(config: dict[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` is told to load the pipeline of a `pipeline_config`; never pickled weights."""
    return {"use_safetensors": True, **family_of(config).load_options, **absent_components(config)}


def load_teacher(
    name_or_path: str,
    dtype: torch.dtype,
    revision: str | None = None,
    variant: str | None = None,
    max_sequence_length: int | None = None,
) -> Teacher:
    """Loads a teacher from a folder, from the Hub, or an embedded one by its name; safetensors only.

    Args:
        name_or_path: a folder, a Hub id, or an embedded teacher by its name.
        dtype: of its weights.
        revision, variant: of a Hub repository.
        max_sequence_length: as in `Teacher`; an embedded teacher knows its own.

    Raises:
        ValueError: as `pipeline_config` and `family_of`.
    """
    config = pipeline_config(name_or_path, revision=revision)
    family = family_of(config)
    pipeline = family.pipeline_class.from_pretrained(
        resolve_teacher(name_or_path),
        revision=revision,
        variant=variant,
        dtype=dtype,
        **load_options(config),
    )
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    if max_sequence_length is None:
        max_sequence_length = MAX_SEQUENCE_LENGTHS.get(name_or_path)
    return Teacher(pipeline, family, name_or_path, max_sequence_length)
