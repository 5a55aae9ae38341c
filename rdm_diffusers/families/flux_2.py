"""FLUX.2: a transformer on patches of latents that are normalised as patches, flow matching, a language model's layers.

The klein base models are guided by two calls; dev gets its guidance as an input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Pipeline, ModelMixin
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from .base import raw_latents
from .conditioning import Conditioning, PromptOptions, encoding_device
from .flow import EmbeddedGuidance, PackedFlowFamily, guidance_input, pack, unpack

MOST_SINGLE_BLOCKS = 48  # of the largest of these models


class Flux2KleinFamily(PackedFlowFamily):
    """Teachers that `Flux2KleinPipeline` loads. Their latents are `[B, C, H, W]`, normalised as patches of 2 x 2."""

    pipeline_class = Flux2KleinPipeline
    prompt_tokens = 512
    has_tiny_vae = False  # the end of the call reads the statistics of its autoencoder's batch norm
    comfyui_shift = "*ModelSamplingFlux* with both shifts 0"
    architecture_name = "flux-2"
    time_embedding_name = "time_guidance_embed"
    lora_target_modules = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "linear_in", "linear_out", "to_qkv_mlp_proj",
        # By their whole names, because `to_out` is a list of modules in the other blocks.
        *(f"single_transformer_blocks.{index}.attn.to_out" for index in range(MOST_SINGLE_BLOCKS)),
    )  # fmt: skip

    def dynamic_shift(self, settings: Mapping[str, Any], length: int, num_steps: int) -> float:
        """As in `Family`, by the models' own formula, which depends on the number of steps, too."""
        return compute_empirical_mu(length, num_steps)

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        """Embeddings of one length; the network reads those of the padding, too."""
        embeds, _ = pipeline.encode_prompt(list(prompts), encoding_device(pipeline), **options.length)
        guidance = {"guidance": guidance_input(embeds, options)} if self.embeds_guidance(pipeline) else {}
        return Conditioning({"prompt_embeds": embeds, **guidance})

    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        guidance = {"guidance": (1,)} if self.embeds_guidance(pipeline) else {}
        return {"prompt_embeds": (self.tokens(options), pipeline.transformer.config.joint_attention_dim), **guidance}

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        embeds, guidance = conditioning.tensors["prompt_embeds"], conditioning.tensors.get("guidance")
        places = Flux2KleinPipeline._prepare_latent_ids(x_t[:1, :, ::2, ::2])
        output = denoiser(
            hidden_states=pack(x_t).to(embeds.dtype),
            timestep=t / 1000,
            guidance=None if guidance is None else guidance.flatten(),
            encoder_hidden_states=embeds,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(embeds[:1]).to(x_t.device),
            img_ids=places.to(x_t.device),
            return_dict=False,
        )[0]
        return unpack(output, x_t)

    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        vae, (mean, std) = pipeline.vae, _moments(pipeline.vae, latents)
        raw = Flux2KleinPipeline._unpatchify_latents(Flux2KleinPipeline._patchify_latents(latents) * std + mean)
        return (vae.decode(raw.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def encode(self, pipeline: DiffusionPipeline, images: Tensor) -> Tensor:
        patches = Flux2KleinPipeline._patchify_latents(raw_latents(pipeline.vae, images))
        mean, std = _moments(pipeline.vae, patches)
        return Flux2KleinPipeline._unpatchify_latents((patches - mean) / std)


class Flux2Family(EmbeddedGuidance, Flux2KleinFamily):
    """Teachers that `Flux2Pipeline` loads: dev, and its fine-tunes. Prompts include a standing instruction."""

    pipeline_class = Flux2Pipeline


def _moments(vae: ModelMixin, latents: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the deviation of each channel of patches, `[1, 4 C, 1, 1]`."""
    mean, variance = (each.to(latents).reshape(1, -1, 1, 1) for each in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()
