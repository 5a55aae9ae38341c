"""Rebuilds the embedded v-prediction teacher: `python -m rdm_diffusers.tiny.make_v_teacher --output_dir v`.

It is the first tiny teacher with its U-Net fine-tuned to predict v instead of the noise (arXiv 2202.00512), stored in
half precision. Its reference statistics are measured with the shipped classifier.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from . import TINY_TEACHER, TINY_V_NAME
from .make_teacher import SEED, rebuild, remove_paths, tokenize, train_denoiser


def finetune(pipeline: StableDiffusionPipeline, steps: int) -> None:
    """Trains the U-Net, in place, with the v loss at uniform times; it ends as its moving average."""
    generator = torch.Generator().manual_seed(SEED + 4)
    with torch.no_grad():
        embeds = pipeline.text_encoder(tokenize(pipeline.tokenizer))[0]

    def loss_of(x0: Tensor, captions: Tensor, noise: Tensor) -> Tensor:
        timesteps = torch.randint(1000, (len(x0),), generator=generator)
        noisy = pipeline.scheduler.add_noise(x0, noise, timesteps)
        velocity = pipeline.scheduler.get_velocity(x0, noise, timesteps)
        return F.mse_loss(pipeline.unet(noisy, timesteps, embeds[captions]).sample, velocity)

    train_denoiser(loss_of, pipeline.vae, generator, list(pipeline.unet.parameters()), steps, 1e-3, 0.999)


def make(steps: int, folder: Path) -> None:
    """Writes the fine-tuned pipeline into `folder`."""
    start = StableDiffusionPipeline.from_pretrained(TINY_TEACHER, use_safetensors=True)
    scheduler = DDIMScheduler.from_config(start.scheduler.config, prediction_type="v_prediction")
    components = {**start.components, "scheduler": scheduler}
    pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    finetune(pipeline, steps)
    pipeline.to(torch.float16).save_pretrained(folder)
    remove_paths(folder)


if __name__ == "__main__":
    rebuild(TINY_V_NAME, __doc__, 4000, make)
