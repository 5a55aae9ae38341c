"""Krea 2: a single-stream transformer on patches of latents, flow matching, Qwen3-VL's layers as the text encoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline, Krea2Pipeline
from torch import Tensor

from ..sizes import Resolution
from .conditioning import Conditioning, PromptOptions, encoding_device
from .flow import AddedGuidance, PackedFlowFamily, pack, unpack
from .qwen_image import decode_frame, encode_frame


class Krea2Family(AddedGuidance, PackedFlowFamily):
    """Teachers that `Krea2Pipeline` loads."""

    pipeline_class = Krea2Pipeline
    prompt_tokens = 512
    extra_encoder_tokens = 34  # of the standing instruction
    has_tiny_vae = False  # its latents are one frame of a film's
    comfyui_shift = "*ModelSamplingAuraFlow* with shift 1"
    architecture_name = "krea-2"
    time_embedding_name = "time_embed"
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0", "to_gate", "ff.gate", "ff.up", "ff.down")

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        """The states of several layers for each token `[B, tokens, layers, D]`, and the mask.

        The network does not read the order of tokens. So the padding, which the stock pipeline has before the last
        tokens, is moved to the end here, as zeros.
        """
        states, mask = pipeline.encode_prompt(list(prompts), encoding_device(pipeline), **options.length)
        mask, order = mask.sort(dim=1, descending=True, stable=True)
        states = states[torch.arange(len(states), device=order.device)[:, None], order]
        return Conditioning({"prompt_embeds": states * mask[:, :, None, None], "prompt_embeds_mask": mask})

    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        tokens, config = self.tokens(options), pipeline.transformer.config
        shape = (tokens, config.num_text_layers, config.text_hidden_dim)
        return {"prompt_embeds": shape, "prompt_embeds_mask": (tokens,)}

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        states, mask = (conditioning.tensors[name] for name in ("prompt_embeds", "prompt_embeds_mask"))
        longest = int(mask.sum(1).max())
        mask = mask[:, :longest].bool()
        rows, columns = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        output = denoiser(
            hidden_states=pack(x_t).to(states.dtype),
            encoder_hidden_states=states[:, :longest],
            timestep=t / 1000,
            position_ids=Krea2Pipeline.prepare_position_ids(longest, rows, columns, x_t.device),
            encoder_attention_mask=None if mask.all() else mask,
            return_dict=False,
        )[0]
        return unpack(output, x_t)

    def latent_shape(self, pipeline: DiffusionPipeline, resolution: Resolution | None) -> tuple[int, int, int]:
        channels = pipeline.transformer.config.in_channels // 4
        return self.latents_of(pipeline, channels, resolution or 1024, 2)

    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        return decode_frame(pipeline, latents)

    def encode(self, pipeline: DiffusionPipeline, images: Tensor) -> Tensor:
        return encode_frame(pipeline, images)
