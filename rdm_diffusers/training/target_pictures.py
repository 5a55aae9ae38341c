"""The teacher's images that a target learns from, as picture files: what an evaluation takes as its reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.pictures import save_image
from ..families import Teacher
from ..folders import ASIDE, write_whole
from .devices import on_device

ORIGIN, PROMPTS = "origin.txt", "prompts.txt"


def check_origin(folder: Path, origin: str) -> None:
    """ValueError if the folder holds images of another `origin`, a digest of all that decides them."""
    path = folder / ORIGIN
    if path.exists() and path.read_text() != origin:
        raise ValueError(
            f"--target_images_dir {folder} holds images that were drawn otherwise; name another folder, or remove it."
        )


@torch.no_grad()
def write_target_pictures(
    folder: Path, origin: str, latents: Tensor, prompts: Sequence[str], teacher: Teacher, accelerator: Accelerator
) -> None:
    """Decodes the images that the folder lacks. Every process must call, and writes its share.

    Args:
        folder: gets `000000.png` and so on, and `prompts.txt`, whose line i is the prompt of picture i.
        origin: a digest of all that decides the images.
        latents: `[N, C, H, W]`.
        prompts: of each image.
        teacher: whose autoencoder decodes them.
        accelerator: of the run.
    """
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ORIGIN, origin)
        write_whole(folder / PROMPTS, "".join(" ".join(prompt.split()) + "\n" for prompt in prompts))
    accelerator.wait_for_everyone()
    own = range(accelerator.process_index, len(latents), accelerator.num_processes)
    missing = [i for i in own if not (folder / f"{i:06}.png").exists()]
    aside = folder / f"{ASIDE}{accelerator.process_index}.png"
    with on_device([teacher.pipeline.vae], accelerator.device):
        for i in tqdm(missing, desc="pictures", unit="image", disable=not accelerator.is_main_process):
            latent = latents[i : i + 1].to(accelerator.device, torch.float32)
            save_image(teacher.family.decode(teacher.pipeline, latent)[0], folder / f"{i:06}.png", aside)
    accelerator.wait_for_everyone()
