"""Rebuilds the embedded v-prediction teacher: `python -m rdm_diffusers.tiny.make_v_teacher --output_dir v`.

The first tiny teacher's U-Net, fine-tuned to predict v instead of the noise (arXiv 2202.00512), with its text encoder
and autoencoder as they are; stored in half precision. Then its reference statistics, with the shipped classifier.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from torch import Tensor

from . import TINY_TEACHER, TINY_TEACHERS, TINY_V_NAME
from .captions import DRAWINGS
from .classifier import load_classifier
from .make_teacher import SEED, draw_batch, encode_pool, minimise, tokenize
from .reference import write_reference


def finetune(pipeline: StableDiffusionPipeline, steps: int) -> None:
    """Trains the U-Net, in place, with the v loss at uniform times, and leaves its moving average."""
    generator = torch.Generator().manual_seed(SEED + 4)
    latents, drawings = encode_pool(pipeline.vae, generator)
    with torch.no_grad():
        embeds = pipeline.text_encoder(tokenize(pipeline.tokenizer, [d.caption for d in DRAWINGS] + [""]))[0]
    parameters = list(pipeline.unet.parameters())
    ema = EMAModel(parameters, decay=0.999)

    def loss_of(step: int) -> Tensor:
        x0, captions, noise = draw_batch(latents, drawings, generator)
        timesteps = torch.randint(1000, (len(x0),), generator=generator)
        noisy = pipeline.scheduler.add_noise(x0, noise, timesteps)
        velocity = pipeline.scheduler.get_velocity(x0, noise, timesteps)
        return F.mse_loss(pipeline.unet(noisy, timesteps, embeds[captions]).sample, velocity)

    for _ in minimise(loss_of, parameters, steps, 1e-3, "denoiser"):
        ema.step(parameters)
    ema.copy_to(parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to build in; a finished teacher is kept")
    parser.add_argument("--denoiser_steps", type=int, default=4000)
    args = parser.parse_args()
    teacher = args.output_dir / Path(TINY_TEACHERS[TINY_V_NAME]).name
    if not (teacher / "model_index.json").exists():
        start = StableDiffusionPipeline.from_pretrained(TINY_TEACHER, use_safetensors=True)
        scheduler = DDIMScheduler.from_config(start.scheduler.config, prediction_type="v_prediction")
        components = {**start.components, "scheduler": scheduler}
        pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
        finetune(pipeline, args.denoiser_steps)
        pipeline.to(torch.float16).save_pretrained(teacher)
        for path in teacher.rglob("config.json"):
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)  # this machine's
            path.write_text(json.dumps(config, indent=2) + "\n")
    write_reference(args.output_dir, TINY_V_NAME, load_classifier())


if __name__ == "__main__":
    main()
