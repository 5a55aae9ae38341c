"""FLUX.1: a transformer on patches of latents, flow matching, CLIP and T5; dev is told its guidance as a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor

from .base import Conditioning, PromptOptions, encoding_device, square_latents
from .flow import FlowFamily
from .packing import pack, patch_positions, unpack


class FluxFamily(FlowFamily):
    """Teachers that `FluxPipeline` loads: dev, schnell, and their fine-tunes."""

    pipeline_class = FluxPipeline
    longest_prompt = 512
    comfyui_shift = "*ModelSamplingFlux* with both shifts 0"
    architecture_name = "flux-1"
    lora_target_modules = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
    )  # fmt: skip

    def unguided(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, Any]:
        """For a guidance-distilled teacher the value that the student was trained with."""
        told = options.embedded_guidance if self.embeds_guidance(pipeline) else None
        return {"guidance_scale": 0.0 if told is None else told}

    def embeds_guidance(self, pipeline: DiffusionPipeline) -> bool:
        return pipeline.transformer.config.guidance_embeds

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        embeds, pooled, _ = pipeline.encode_prompt(list(prompts), None, encoding_device(pipeline), **options.length)
        tensors = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if self.embeds_guidance(pipeline):
            tensors["guidance"] = torch.full((len(embeds), 1), options.embedded_guidance or 0.0, device=embeds.device)
        return Conditioning(tensors)

    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        tokens, config = options.max_sequence_length or 512, pipeline.transformer.config
        shapes = {"prompt_embeds": (tokens, config.joint_attention_dim)}
        told = {"guidance": (1,)} if config.guidance_embeds else {}
        return {**shapes, "pooled_prompt_embeds": (config.pooled_projection_dim,), **told}

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        embeds, pooled = (conditioning.tensors[name] for name in ("prompt_embeds", "pooled_prompt_embeds"))
        told = conditioning.tensors.get("guidance")
        output = denoiser(
            hidden_states=pack(x_t).to(embeds.dtype),
            timestep=t / 1000,
            guidance=None if told is None else told.flatten(),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=patch_positions(x_t).to(embeds.dtype),
            return_dict=False,
        )[0]
        return unpack(output, x_t)

    def latent_shape(self, pipeline: DiffusionPipeline, resolution: int | None) -> tuple[int, int, int]:
        factor, channels = pipeline.vae_scale_factor, pipeline.transformer.config.in_channels // 4
        return square_latents(channels, resolution or pipeline.default_sample_size * factor, factor, 2)
