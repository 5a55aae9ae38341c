"""FLUX.1: a transformer on patches of latents, flow matching, CLIP and T5; dev gets its guidance as an input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor

from .conditioning import Conditioning, PromptOptions, encoding_device
from .flow import EmbeddedGuidance, PackedFlowFamily, guidance_input, pack, unpack


class FluxFamily(EmbeddedGuidance, PackedFlowFamily):
    """Teachers that `FluxPipeline` loads: dev, schnell, and their fine-tunes."""

    pipeline_class = FluxPipeline
    prompt_tokens = 512
    most_prompt_tokens = 512
    comfyui_shift = "*ModelSamplingFlux* with both shifts 0"
    architecture_name = "flux-1"
    lora_target_modules = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
    )  # fmt: skip

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        embeds, pooled, _ = pipeline.encode_prompt(list(prompts), None, encoding_device(pipeline), **options.length)
        tensors = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if self.embeds_guidance(pipeline):
            tensors["guidance"] = guidance_input(embeds, options)
        return Conditioning(tensors)

    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        config = pipeline.transformer.config
        shapes = {
            "prompt_embeds": (self.tokens(options), config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }
        return {**shapes, "guidance": (1,)} if config.guidance_embeds else shapes

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        embeds, pooled = (conditioning.tensors[name] for name in ("prompt_embeds", "pooled_prompt_embeds"))
        guidance = conditioning.tensors.get("guidance")
        rows, columns = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        output = denoiser(
            hidden_states=pack(x_t).to(embeds.dtype),
            timestep=t / 1000,
            guidance=None if guidance is None else guidance.flatten(),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(len(x_t), rows, columns, x_t.device, embeds.dtype),
            return_dict=False,
        )[0]
        return unpack(output, x_t)
