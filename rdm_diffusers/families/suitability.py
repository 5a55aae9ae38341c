"""Refuses models that cannot be teachers, each in one sentence that says what to give instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, LCMScheduler, TCDScheduler

from .base import INDEX, LORA_FILE, Family

CHECKPOINT_RECORD = "state.json"  # of every checkpoint of a run
LEAST_SIGNAL = 1e-5  # alphas_cumprod at the noisiest time; Stable Diffusion's is 5e-3, zero terminal SNR is 6e-8


def check_folder(name: str, folder: Path) -> None:
    """Refuses a folder that holds no teacher, as far as its files show that. Raises ValueError."""
    if folder.is_file():
        raise ValueError(
            f"{name} is a single file; save it as a folder first: in Python, the pipeline class's "
            f"from_single_file({name!r}).save_pretrained('teacher')."
        )
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise ValueError(f"The teacher folder {name} does not exist; check the path or give a Hub model id.")
        return
    if (folder / INDEX).exists():
        return
    if (folder / LORA_FILE).exists():
        raise ValueError(f"{name} is a LoRA, not a teacher; give the model that it was trained on.")
    check_no_checkpoint(name)
    raise ValueError(f"{name} has no model_index.json; give a folder that a diffusers pipeline saved.")


def check_no_checkpoint(name: str) -> None:
    """Refuses a run's checkpoint, or a folder of them, where a student or a teacher is expected.

    Raises:
        ValueError: naming `rdm-export`, which writes a checkpoint's student.
    """
    folder = Path(name)
    inside = sorted(path for path in folder.glob("checkpoint-*") if (path / CHECKPOINT_RECORD).exists())
    if not inside and not (folder / CHECKPOINT_RECORD).exists():
        return
    kind, example = ("holds checkpoints of an unfinished run", inside[-1]) if inside else ("is a checkpoint", folder)
    raise ValueError(
        f"{name} {kind}; write its student first with `rdm-export {example} --output_dir STUDENT`, and give that."
    )


def check_lora(family: Family) -> None:
    """Refuses families whose stock pipeline loads no LoRAs. Raises ValueError."""
    if not family.has_lora:
        name = family.pipeline_class.__name__
        raise ValueError(f"{name} loads no LoRAs, so its students are full ones, which this script does not train.")


def check_index(name: str, config: dict[str, Any]) -> None:
    """Refuses few-step models that say so in their `pipeline_config`. Raises ValueError."""
    if config.get("is_distilled"):
        raise ValueError(f"{name} is distilled to few steps already; give the model that it was distilled from.")
    if config.get("sample_sigmas"):  # stock calls would lay these times, not the student's
        raise ValueError(
            f"{name} names its own times of sampling (sample_sigmas in {INDEX}), which no student can change; give the "
            "model that it was distilled from, or set them to null."
        )


def check_teacher(name: str, pipeline: DiffusionPipeline) -> None:
    """Refuses loaded pipelines that are not text-to-image teachers. Raises ValueError.

    Epsilon prediction at a time without any signal is refused, too, because it says nothing about x0.
    """
    scheduler, unet = pipeline.scheduler, getattr(pipeline, "unet", None)
    if unet is not None and unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise ValueError(
            f"{name} has a U-Net of {unet.config.in_channels} input channels, as inpainting models do; give a "
            "text-to-image model."
        )
    embeds_guidance = unet is not None and unet.config.get("time_cond_proj_dim") is not None
    if embeds_guidance or isinstance(scheduler, LCMScheduler | TCDScheduler):
        raise ValueError(f"{name} is distilled to few steps already; give the model that it was distilled from.")
    signal = getattr(scheduler, "alphas_cumprod", None)
    epsilon = scheduler.config.get("prediction_type") == "epsilon"
    if epsilon and signal is not None and signal[-1] < LEAST_SIGNAL:
        raise ValueError(
            f"{name} predicts epsilon with zero terminal SNR, which leaves its first step undefined; set "
            "rescale_betas_zero_snr to false in its scheduler_config.json, or give a v-prediction model."
        )
