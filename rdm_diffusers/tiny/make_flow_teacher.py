"""Rebuilds the embedded flow teacher: `python -m rdm_diffusers.tiny.make_flow_teacher --output_dir flow`.

It has the captions and the autoencoder of the first tiny teacher, but is a Stable Diffusion 3 pipeline: two text
encoders, a transformer of joint attention, and flow matching. Its reference statistics are measured with the shipped
classifier.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from . import MAX_SEQUENCE_LENGTHS, TINY_FLOW_NAME, TINY_TEACHER
from .captions import make_tokenizer
from .make_teacher import SEED, rebuild, text_config, tokenize, train_denoiser

TEXT_DIMS = (64, 32)
T5_TOKENS = MAX_SEQUENCE_LENGTHS[TINY_FLOW_NAME]  # zeros, which stock pipelines append without a third encoder
TRANSFORMER = dict(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=5, num_attention_heads=4,
    attention_head_dim=24, caption_projection_dim=96, joint_attention_dim=sum(TEXT_DIMS),
    pooled_projection_dim=sum(TEXT_DIMS), pos_embed_max_size=8, qk_norm="rms_norm",
)  # fmt: skip


class Denoiser(nn.Module):
    """The transformer and its text encoders, trained together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.transformer = SD3Transformer2DModel(**TRANSFORMER)
        self.text_encoders = nn.ModuleList(
            CLIPTextModelWithProjection(text_config(tokenizer, dim)) for dim in TEXT_DIMS
        )

    def forward(self, x_t: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """The velocity `[B, 4, 8, 8]` at noisy latents, noise levels `[B]` and token ids `[B, L]`."""
        embeds, pooled = encode_text(self.text_encoders, tokens)
        return self.transformer(x_t, embeds, pooled, sigma * 1000, return_dict=False)[0]


def encode_text(encoders: nn.ModuleList, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids `[B, L]` -> embeddings `[B, L + 1, D]` and pooled ones `[B, D]`, as `StableDiffusion3Pipeline` does."""
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    embeds = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return F.pad(embeds, (0, 0, 0, T5_TOKENS)), torch.cat([output.text_embeds for output in outputs], -1)


def make(steps: int, folder: Path) -> None:
    """Trains with the rectified-flow loss at logit-normal times (SD3, arXiv 2403.03206); writes the pipeline."""
    torch.manual_seed(SEED + 3)
    generator, tokenizer = torch.Generator().manual_seed(SEED + 3), make_tokenizer()
    vae = AutoencoderKL.from_pretrained(Path(TINY_TEACHER) / "vae")
    vae.register_to_config(_name_or_path="vae", shift_factor=0.0)  # not this machine's path
    denoiser, tokens = Denoiser(tokenizer), tokenize(tokenizer)

    def loss_of(x0: Tensor, captions: Tensor, noise: Tensor) -> Tensor:
        sigma = compute_density_for_timestep_sampling("logit_normal", len(x0), 0.0, 1.0, generator=generator)
        scale = sigma[:, None, None, None]
        noisy = (1 - scale) * x0 + scale * noise
        return F.mse_loss(denoiser(noisy, sigma, tokens[captions]), noise - x0)

    train_denoiser(loss_of, vae, generator, list(denoiser.parameters()), steps, 1.5e-3, 0.9995)
    StableDiffusion3Pipeline(
        transformer=denoiser.transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae,
        text_encoder=denoiser.text_encoders[0], tokenizer=tokenizer,
        text_encoder_2=denoiser.text_encoders[1], tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    ).save_pretrained(folder)  # fmt: skip


if __name__ == "__main__":
    rebuild(TINY_FLOW_NAME, __doc__, 14_000, make)
