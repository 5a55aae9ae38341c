"""Stable Diffusion 3 and 3.5: a transformer of joint attention, flow matching, two CLIP text encoders and T5."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from .conditioning import Conditioning, PromptOptions, encoding_device
from .flow import FlowFamily


class StableDiffusion3Family(FlowFamily):
    """Teachers that `StableDiffusion3Pipeline` loads, with or without the third text encoder."""

    pipeline_class = StableDiffusion3Pipeline
    prompt_tokens = 256
    most_prompt_tokens = 512
    extra_encoder_tokens = -77  # CLIP's are appended to T5's
    comfyui_shift = "*ModelSamplingSD3* with shift 1"
    architecture_name = "stable-diffusion-3"
    lora_target_modules = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip

    def largest_side(self, pipeline: DiffusionPipeline) -> int | None:
        config = pipeline.transformer.config
        return config.pos_embed_max_size * config.patch_size * pipeline.vae_scale_factor

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, None, encoding_device(pipeline), do_classifier_free_guidance=False, **options.length
        )
        return Conditioning({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        tokens = pipeline.text_encoder.config.max_position_embeddings + self.tokens(options)
        config = pipeline.transformer.config
        return {
            "prompt_embeds": (tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        embeds, pooled = (conditioning.tensors[name] for name in ("prompt_embeds", "pooled_prompt_embeds"))
        return denoiser(x_t.to(embeds.dtype), embeds, pooled, t, return_dict=False)[0]
