"""Rebuilds the embedded flow teacher: `python -m rdm_diffusers.tiny.make_flow_teacher --output_dir flow`.

The same captions and autoencoder as the first tiny teacher, but a Stable Diffusion 3 pipeline: two text encoders, a
transformer of joint attention, and flow matching. Then its reference statistics, as for the first one, with the
shipped classifier.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from . import MAX_SEQUENCE_LENGTHS, TINY_FLOW_NAME, TINY_TEACHER, TINY_TEACHERS
from .captions import DRAWINGS
from .classifier import load_classifier
from .make_teacher import SEED, draw_batch, encode_pool, parse_steps, text_config, tokenize, train_denoiser
from .reference import write_reference
from .tokenizer import make_tokenizer

TEXT_DIMS = (64, 32)
# Zeros instead of the third encoder's tokens, which stock pipelines append if there is none.
T5_TOKENS = MAX_SEQUENCE_LENGTHS[TINY_FLOW_NAME]

TRANSFORMER = dict(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=5,
    attention_head_dim=24,
    num_attention_heads=4,
    caption_projection_dim=96,
    joint_attention_dim=sum(TEXT_DIMS),
    pooled_projection_dim=sum(TEXT_DIMS),
    pos_embed_max_size=8,
    qk_norm="rms_norm",
)


class Denoiser(nn.Module):
    """The transformer and its text encoders, trained as one."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.transformer = SD3Transformer2DModel(**TRANSFORMER)
        self.text_encoders = nn.ModuleList(
            CLIPTextModelWithProjection(text_config(tokenizer, dim)) for dim in TEXT_DIMS
        )

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids `[B, L]` -> prompt embeddings `[B, L + T5_TOKENS, D]`, pooled ones `[B, D]`, as the pipeline's."""
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in self.text_encoders]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return F.pad(embeds, (0, 0, 0, T5_TOKENS)), torch.cat([output.text_embeds for output in outputs], -1)

    def forward(self, x_t: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        embeds, pooled = self.embed(tokens)
        return self.transformer(x_t, embeds, pooled, sigma * 1000, return_dict=False)[0]


def make_denoiser(vae: AutoencoderKL, tokenizer: CLIPTokenizer, steps: int) -> Denoiser:
    """Trains with the rectified-flow loss at logit-normal times (SD3, arXiv 2403.03206); the moving average."""
    generator = torch.Generator().manual_seed(SEED + 3)
    denoiser = Denoiser(tokenizer)
    latents, drawings = encode_pool(vae, generator)
    tokens = tokenize(tokenizer, [drawing.caption for drawing in DRAWINGS] + [""])

    def loss_of(step: int) -> Tensor:
        x0, captions, noise = draw_batch(latents, drawings, generator)
        sigma = compute_density_for_timestep_sampling("logit_normal", len(x0), 0.0, 1.0, generator=generator)
        scale = sigma[:, None, None, None]
        noisy = (1 - scale) * x0 + scale * noise
        return F.mse_loss(denoiser(noisy, sigma, tokens[captions]), noise - x0)

    train_denoiser(loss_of, list(denoiser.parameters()), steps, 1.5e-3, 0.9995)
    return denoiser


def make_pipeline(steps: int) -> StableDiffusion3Pipeline:
    """Trains the denoiser on the first teacher's autoencoder; the whole pipeline."""
    torch.manual_seed(SEED + 3)
    vae = AutoencoderKL.from_pretrained(Path(TINY_TEACHER) / "vae")
    vae.register_to_config(_name_or_path="vae", shift_factor=0.0)  # not this machine's path
    tokenizer = make_tokenizer()
    denoiser = make_denoiser(vae, tokenizer, steps)
    return StableDiffusion3Pipeline(
        transformer=denoiser.transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae,
        text_encoder=denoiser.text_encoders[0], tokenizer=tokenizer,
        text_encoder_2=denoiser.text_encoders[1], tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def main() -> None:
    folder, steps = parse_steps(__doc__, denoiser=14_000)
    teacher = folder / Path(TINY_TEACHERS[TINY_FLOW_NAME]).name
    if not (teacher / "model_index.json").exists():
        make_pipeline(steps["denoiser"]).save_pretrained(teacher)
    write_reference(folder, TINY_FLOW_NAME, load_classifier())


if __name__ == "__main__":
    main()
