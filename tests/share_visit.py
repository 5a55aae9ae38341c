"""Visits to a Hub on this machine by people who want a student, each a process of its own; see test_share.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STUDENT, FULL = "me/tiny-student", "me/tiny-full"
CALL: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 0.0}


def draw(pipeline: Any, prompts: list[str], **call: Any) -> Tensor:
    """A picture a prompt `[N, 3, 32, 32]`, with the seeds that samples.png is drawn with."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipeline(prompts, generator=generators, output_type="pt", **call).images


def without_our_package(prompts: list[str], teacher: str, token: str) -> dict[str, Tensor]:
    """What stock diffusers draws where rdm_diffusers cannot be imported."""
    sys.modules["rdm_diffusers"] = None  # type: ignore[assignment]
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline, LCMScheduler, StableDiffusionPipeline

    pictures = {}
    for name, loader in ("stock full", DiffusionPipeline), ("auto full", AutoPipelineForText2Image):
        pictures[name] = draw(loader.from_pretrained(FULL, token=token), prompts, **CALL)
    pipeline = StableDiffusionPipeline.from_pretrained(teacher)
    pipeline.scheduler = LCMScheduler.from_pretrained(STUDENT, subfolder="scheduler")
    pipeline.unet.load_state_dict(with_deltas(pipeline.unet, comfyui_file()))
    pictures["comfyui"] = draw(pipeline, prompts, **CALL)
    pipeline = StableDiffusionPipeline.from_pretrained(teacher)
    pipeline.load_lora_weights(STUDENT)
    pipeline.scheduler = LCMScheduler.from_pretrained(STUDENT, subfolder="scheduler")
    pictures["stock"] = draw(pipeline, prompts, **CALL)
    del sys.modules["rdm_diffusers"]
    return pictures


def comfyui_file() -> dict[str, Tensor]:
    """The weights of the file for ComfyUI, as a user downloads it."""
    from huggingface_hub import HfApi, hf_hub_download
    from safetensors.torch import load_file

    (name,) = [file for file in HfApi().list_repo_files(STUDENT) if file.startswith("comfyui/")]
    return load_file(hf_hub_download(STUDENT, name))


def with_deltas(unet: torch.nn.Module, lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's weights plus alpha / rank * up @ down of each of its modules that the file names; all must be."""
    weights = unet.state_dict()
    names = {f"lora_unet_{name.replace('.', '_')}": name for name, _ in unet.named_modules()}
    for key in {key.split(".")[0] for key in lora}:
        up, down, alpha = (lora.pop(f"{key}.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        delta = alpha / len(down) * up.flatten(1) @ down.flatten(1)
        weight = weights[f"{names[key]}.weight"]
        weights[f"{names[key]}.weight"] = weight + delta.reshape(weight.shape)
    assert not lora
    return weights


def with_our_package(prompts: list[str], token: str | None = None) -> dict[str, Tensor]:
    """What the students of the Hub draw by themselves, and the checkpoints by their tags."""
    from rdm_diffusers import RdmDistillationPipeline

    asked = {"ours": (STUDENT, None), "ours full": (FULL, None), "earlier": (STUDENT, "checkpoint-1")}
    return {
        name: draw(RdmDistillationPipeline.from_pretrained(student, revision=revision, token=token), prompts)
        for name, (student, revision) in asked.items()
    }


def validation(prompts: list[str]) -> Tensor:
    """The pictures that the trainer drew as it trained: all noises from one generator of the run's seed."""
    from rdm_diffusers import RdmDistillationPipeline
    from rdm_diffusers.distillation import Draws

    pipeline = RdmDistillationPipeline.from_pretrained(STUDENT)
    pipeline.set_progress_bar_config(disable=True)
    generator = Draws(0, 4, torch.device("cpu")).generator("validation", 0)
    return pipeline(prompts, generator=generator, output_type="pt").images


if __name__ == "__main__":
    what, folder, words = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    if what == "visit":
        drawn = without_our_package(**words)
        drawn |= with_our_package(words["prompts"], words["token"]) | {"validation": validation(words["prompts"])}
    else:
        drawn = with_our_package(words["prompts"])
    torch.save(drawn, folder / f"{what}.pt")
