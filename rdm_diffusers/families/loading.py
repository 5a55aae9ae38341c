"""Finds the family of a teacher, and loads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin

from ..prediction import NoiseSchedule
from ..tiny import resolve_teacher
from .base import Family
from .sd_unet import StableDiffusionFamily

FAMILIES: dict[str, Family] = {"StableDiffusionPipeline": StableDiffusionFamily()}
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher: the stock pipeline, frozen, and what its family knows about it."""

    pipeline: DiffusionPipeline
    family: Family
    name: str

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


def pipeline_class_name(name_or_path: str, **hub_options) -> str:
    """The pipeline class that a teacher's `model_index.json` names.

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
        config = DiffusionPipeline.load_config(resolve_teacher(name_or_path), **hub_options)
    except OSError as error:
        if folder.is_dir():
            raise ValueError(f"{folder}/model_index.json is damaged; save or download the teacher again.") from error
        raise ValueError(
            f"The teacher {name_or_path!r} is no local folder and could not be had from the Hub; check its name and "
            "your connection, and log in with `hf auth login` if it is gated."
        ) from error
    return config["_class_name"]


def family_of(name_or_path: str, **hub_options) -> Family:
    """The family that knows this teacher's pipeline class.

    Raises:
        ValueError: as `pipeline_class_name`, and for a class that no family knows.
    """
    class_name = pipeline_class_name(name_or_path, **hub_options)
    if class_name not in FAMILIES:
        raise ValueError(f"Teachers of class {class_name} are not supported; supported are {', '.join(FAMILIES)}.")
    return FAMILIES[class_name]


def load_teacher(
    name_or_path: str, dtype: torch.dtype, revision: str | None = None, variant: str | None = None
) -> Teacher:
    """Loads a teacher from a folder, from the Hub, or the embedded one for the name `tiny`; safetensors only.

    Raises:
        ValueError: as `family_of`.
    """
    family = family_of(name_or_path, revision=revision)
    pipeline = family.pipeline_class.from_pretrained(
        resolve_teacher(name_or_path),
        revision=revision,
        variant=variant,
        dtype=dtype,
        use_safetensors=True,
        **family.load_options,
    )
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    return Teacher(pipeline, family, name_or_path)
