"""Notices models that are distilled to few steps already: for certain by their configurations, else by a name.

Such a model makes a poor teacher. Guidance is trained into it, so that more of it does harm, and its scores are trained
at a few times only, while R_dm needs them at all times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import LCMScheduler, SchedulerMixin, TCDScheduler
from safetensors import safe_open

from .base import INDEX, STUDENT_CONFIG
from .loras import Lora

# Names of methods and releases, as whole words.
WORDS = {
    "schnell", "turbo", "lightning", "lcm", "tcd", "pcm", "dmd", "dmd2", "hyper", "hypersd", "hypersdxl", "sdxs",
    "instaflow", "perflow", "flash", "sprint", "distill", "distilled",
}  # fmt: skip
SNAPSHOT = re.compile(r"/snapshots/[0-9a-f]+/?$")  # in the Hub's cache, below a folder with the repository's name
UNDONE = re.compile(r"\b(de|un)[-_ ]?distill(ed|ation)?\b", re.IGNORECASE)
STEPS = re.compile(r"(?<![0-9a-z])(1[0-6]|[1-9])[-_ ]?steps?(?![a-z])", re.IGNORECASE)
PARTS_OF_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")  # of `sdxlTurbo` and `XL_v2LightningDPM`
# What to give instead, by the stock pipeline's class.
BASES = {
    "StableDiffusionPipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "StableDiffusionXLPipeline": "stabilityai/stable-diffusion-xl-base-1.0",
    "StableDiffusion3Pipeline": "stabilityai/stable-diffusion-3.5-large",
    "FluxPipeline": "black-forest-labs/FLUX.1-dev",
    "Flux2KleinPipeline": "black-forest-labs/FLUX.2-klein-base-9B",
    "PixArtSigmaPipeline": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "SanaPipeline": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "ZImagePipeline": "Tongyi-MAI/Z-Image",
    "QwenImagePipeline": "Qwen/Qwen-Image",
    "QwenImage21Pipeline": "Qwen/Qwen-Image-2.1",
    "ChromaPipeline": "lodestones/Chroma1-HD",
    "Krea2Pipeline": "krea/Krea-2-Raw",
}
OWN_MARK = "distilled with rdm_diffusers"  # in the description of a student's file for ComfyUI
TITLES = ("ss_output_name", "modelspec.title")  # names in the metadata of kohya's tools and of ModelSpec


def check_not_distilled(
    name: str, index: Mapping[str, Any], scheduler: SchedulerMixin, denoiser: Mapping[str, Any]
) -> None:
    """Refuses a model whose configurations say that it is distilled to few steps.

    Args:
        name: of the model.
        index: the contents of its `model_index.json`.
        scheduler: its own.
        denoiser: the configuration of its denoiser.

    Raises:
        ValueError: naming the entry, and what to give instead.
    """
    reason = None
    if index.get("is_distilled"):
        reason = "is_distilled in its model_index.json"
    elif denoiser.get("time_cond_proj_dim") is not None:
        reason = "time_cond_proj_dim, the guidance input of latent consistency models, in its U-Net's config.json"
    elif isinstance(scheduler, LCMScheduler | TCDScheduler):
        reason = f"its scheduler is a {type(scheduler).__name__}"
    if reason:
        raise ValueError(f"{name} is distilled to few steps already ({reason}); {_instead(index)}.")
    if index.get("sample_sigmas"):  # stock calls would lay these times, not the student's
        raise ValueError(
            f"{name} names its own times of sampling (sample_sigmas in {INDEX}), which no student can change; give the "
            "model that it was distilled from, or set them to null."
        )


def few_step_warning(
    name: str, index: Mapping[str, Any], scheduler: SchedulerMixin, denoiser: Mapping[str, Any]
) -> str | None:
    """A warning of a teacher that may be distilled to few steps; None if nothing hints at that.

    Arguments as in `check_not_distilled`. Names and the settings of samplers are no proof, and the warning says so.
    """
    settings = scheduler.config
    own = (name, _repository(name), index.get("_name_or_path") or "")
    word = next(filter(None, map(few_step_word, own)), None)
    spacing, euler = settings.get("timestep_spacing"), type(scheduler).__name__.startswith("Euler")
    if index.get("is_distilled") is False:  # the family's releases say for certain
        return None
    if word:
        guess = f"by {word!r} in its name"
    elif denoiser.get("guidance_embeds") is False and settings.get("shift") == 1 and "use_dynamic_shifting" in settings:
        guess = "by its configuration, which is that of FLUX.1 schnell"
    elif euler and spacing == "trailing" and settings.prediction_type == "epsilon":
        guess = "by its scheduler's timestep_spacing, which is trailing, as of the turbo releases"
    else:
        return None
    return (
        f"{name} seems to be distilled to few steps already, {guess}. Guidance harms such a teacher, and its scores "
        f"are untrained at most times. If it is, {_instead(index)}."
    )


def _instead(index: Mapping[str, Any]) -> str:
    base = BASES.get(index["_class_name"])
    return "give the model that it was distilled from" + (f", for example {base}" if base else "")


def few_step_word(name: str) -> str | None:
    """What in a model's name hints at few steps, for example `Lightning`; None if nothing does.

    Of a path and of a Hub id only the last name counts, because folders and owners are called anything.
    """
    path = Path(SNAPSHOT.sub("", name))
    last = UNDONE.sub("", path.stem if path.suffix == ".safetensors" else path.name)
    parts = [part for part in re.split(r"[^A-Za-z0-9]+", last) if part]
    words = [*parts, *(word for part in parts for word in PARTS_OF_WORDS.findall(part))]
    lower = [word.lower() for word in words]
    klein = ["klein"] if "klein" in lower and "base" not in lower else []  # FLUX.2's, whose base is named so
    steps = STEPS.search(last)
    return next((word for word in words if word.lower() in {*WORDS, *klein}), steps and steps[0])


def _repository(name: str) -> str:
    """The Hub repository of a file in one; empty for other names."""
    parts = name.split("/")
    return "/".join(parts[:2]) if len(parts) > 2 and parts[0] not in ("", ".", "..") and not Path(name).exists() else ""


def check_lora_not_distilled(lora: Lora) -> str | None:
    """Refuses a student of ours as a teacher's LoRA; a warning of others that may be for few steps, or None.

    Raises:
        ValueError: if the LoRA is a student, as the files beside it or its metadata say; as `Lora.file`.
    """
    path = lora.file()
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if (path.parent / STUDENT_CONFIG).exists() or OWN_MARK in metadata.get("modelspec.description", ""):
        raise ValueError(
            f"--teacher_lora {lora.name} is a few-step student, with which a teacher is distilled already; leave it "
            "out, or start the student from it with --init_lora."
        )
    titles = [metadata.get(key, "") for key in TITLES]
    word = next(filter(None, map(few_step_word, [lora.name, _repository(lora.name), path.name, *titles])), None)
    if word is None:
        return None
    return (
        f"--teacher_lora {lora.name} seems to be for few steps, by {word!r} in its name. Guidance harms a teacher with "
        "such a LoRA, and its scores are untrained at most times. If it is, leave it out, or start the student from it "
        "with --init_lora."
    )
