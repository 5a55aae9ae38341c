"""SANA: a linear-attention transformer on deeply compressed latents, flow matching, Gemma as the text encoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline, SanaPipeline
from torch import Tensor

from .conditioning import Conditioning, PromptOptions, encoding_device
from .flow import FlowFamily

INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class SanaFamily(FlowFamily):
    """Teachers that `SanaPipeline` loads. Its standing instruction precedes each prompt, as by default there."""

    pipeline_class = SanaPipeline
    time_embedding_name = "time_embed.emb"
    bins_resolutions = True
    stock_multiple = 32
    prompt_tokens = 300
    extra_encoder_tokens = 256  # of the instruction
    comfyui_keys = None  # ComfyUI does not support SANA
    architecture_name = "sana"
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point")

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        embeds, mask, _, _ = pipeline.encode_prompt(
            list(prompts), False, device=encoding_device(pipeline), complex_human_instruction=INSTRUCTION,
            **options.length,
        )  # fmt: skip
        return self._conditioning(pipeline, embeds, mask)

    @torch.no_grad()
    def encode_nothing(self, pipeline: DiffusionPipeline, options: PromptOptions) -> Conditioning:
        """The empty prompt, without the instruction."""
        _, _, embeds, mask = pipeline.encode_prompt([""], True, device=encoding_device(pipeline), **options.length)
        return self._conditioning(pipeline, embeds, mask)

    def _conditioning(self, pipeline: DiffusionPipeline, embeds: Tensor, mask: Tensor) -> Conditioning:
        scale = torch.full((len(embeds), 1), pipeline.transformer.config.timestep_scale, device=embeds.device)
        return Conditioning({"prompt_embeds": embeds, "prompt_attention_mask": mask, "timestep_scale": scale})

    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        tokens, width = self.tokens(options), pipeline.transformer.config.caption_channels
        return {"prompt_embeds": (tokens, width), "prompt_attention_mask": (tokens,), "timestep_scale": (1,)}

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        tensors = conditioning.tensors
        return denoiser(
            x_t.to(tensors["prompt_embeds"].dtype),
            encoder_hidden_states=tensors["prompt_embeds"],
            encoder_attention_mask=tensors["prompt_attention_mask"],
            timestep=t * tensors["timestep_scale"].flatten(),
            return_dict=False,
        )[0]
