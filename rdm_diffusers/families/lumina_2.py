"""Lumina 2: a single-stream transformer, flow matching, Gemma as the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline, Lumina2Pipeline
from torch import Tensor

from .conditioning import Conditioning, PromptOptions, encoding_device
from .flow import FlowFamily


class Lumina2Family(FlowFamily):
    """Teachers that `Lumina2Pipeline` loads. Its system prompt precedes each prompt, as by default there.

    They are guided as by its defaults: at all times (`cfg_trunc_ratio=1.0`), and the guided output is rescaled
    (`cfg_normalization=True`). `--guidance_interval` confines the guidance to some of the times.
    """

    pipeline_class = Lumina2Pipeline
    time_embedding_name = "time_caption_embed.timestep_embedder"
    prompt_tokens = 256
    most_prompt_tokens = 299  # the published network has 300 positions for them, and the image takes one
    comfyui_keys = "joint"
    comfyui_shift = "*ModelSamplingAuraFlow* with shift 1"
    architecture_name = "lumina-2"
    lora_target_modules = (
        "to_q", "to_k", "to_v", "to_out.0", "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3",
    )  # fmt: skip

    def guide(self, unconditional: Tensor, conditional: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """As in `Family`; then each row of latents is rescaled to its norm without guidance, as in the pipeline."""
        guided = super().guide(unconditional, conditional, guidance_scale)
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        embeds, mask, _, _ = pipeline.encode_prompt(
            list(prompts), False, device=encoding_device(pipeline), **options.length
        )
        return Conditioning({"prompt_embeds": embeds, "prompt_embeds_mask": mask})

    @torch.no_grad()
    def encode_nothing(self, pipeline: DiffusionPipeline, options: PromptOptions) -> Conditioning:
        """The empty prompt, without the system prompt."""
        _, _, embeds, mask = pipeline.encode_prompt([""], True, device=encoding_device(pipeline), **options.length)
        return Conditioning({"prompt_embeds": embeds, "prompt_embeds_mask": mask})

    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        tokens, width = self.tokens(options), pipeline.transformer.config.cap_feat_dim
        return {"prompt_embeds": (tokens, width), "prompt_embeds_mask": (tokens,)}

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        embeds, mask = (conditioning.tensors[name] for name in ("prompt_embeds", "prompt_embeds_mask"))
        # The network takes the share of the signal as its time, and predicts x0 - eps.
        return -denoiser(
            hidden_states=x_t.to(embeds.dtype),
            timestep=1 - t / 1000,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]

    def schedule_length(self, channels: int, height: int, width: int) -> int:
        return channels  # the stock pipeline takes their number for that of tokens
