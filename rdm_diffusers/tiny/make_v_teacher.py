"""Rebuilds the embedded v-prediction teacher: `python -m rdm_diffusers.tiny.make_v_teacher --output_dir v`.

The first tiny teacher's U-Net, fine-tuned to predict v instead of the noise (arXiv 2202.00512), with its text encoder
and autoencoder as they are; stored in half precision. Then its reference statistics, with the shipped classifier.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from . import TINY_TEACHER, TINY_TEACHERS, TINY_V_NAME
from .captions import DRAWINGS
from .classifier import load_classifier
from .make_teacher import SEED, draw_batch, encode_pool, parse_steps, tokenize, train_denoiser
from .reference import write_reference


def finetune(pipeline: StableDiffusionPipeline, steps: int) -> None:
    """Trains the U-Net, in place, with the v loss at uniform times, and leaves its moving average."""
    generator = torch.Generator().manual_seed(SEED + 4)
    latents, drawings = encode_pool(pipeline.vae, generator)
    with torch.no_grad():
        embeds = pipeline.text_encoder(tokenize(pipeline.tokenizer, [d.caption for d in DRAWINGS] + [""]))[0]

    def loss_of(step: int) -> Tensor:
        x0, captions, noise = draw_batch(latents, drawings, generator)
        timesteps = torch.randint(1000, (len(x0),), generator=generator)
        noisy = pipeline.scheduler.add_noise(x0, noise, timesteps)
        velocity = pipeline.scheduler.get_velocity(x0, noise, timesteps)
        return F.mse_loss(pipeline.unet(noisy, timesteps, embeds[captions]).sample, velocity)

    train_denoiser(loss_of, list(pipeline.unet.parameters()), steps, 1e-3, 0.999)


def main() -> None:
    folder, steps = parse_steps(__doc__, denoiser=4000)
    teacher = folder / Path(TINY_TEACHERS[TINY_V_NAME]).name
    if not (teacher / "model_index.json").exists():
        start = StableDiffusionPipeline.from_pretrained(TINY_TEACHER, use_safetensors=True)
        scheduler = DDIMScheduler.from_config(start.scheduler.config, prediction_type="v_prediction")
        components = {**start.components, "scheduler": scheduler}
        pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
        finetune(pipeline, steps["denoiser"])
        pipeline.to(torch.float16).save_pretrained(teacher)
        for path in teacher.rglob("config.json"):
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)  # a path on this machine
            path.write_text(json.dumps(config, indent=2) + "\n")
    write_reference(folder, TINY_V_NAME, load_classifier())


if __name__ == "__main__":
    main()
