"""Qwen-Image: a two-stream transformer on patches of latents, flow matching, Qwen2.5-VL as the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, QwenImagePipeline
from torch import Tensor

from .base import raw_latents
from .conditioning import Conditioning, PromptOptions, encoding_device
from .flow import PackedFlowFamily, pack, unpack

NOTHING = " "  # the negative prompt of the model's own examples


class QwenImageFamily(PackedFlowFamily):
    """Teachers that `QwenImagePipeline` loads. Guidance is its `true_cfg_scale`, against a blank prompt."""

    pipeline_class = QwenImagePipeline
    prompt_tokens = 512
    most_prompt_tokens = 1024
    extra_encoder_tokens = 34  # of the standing instruction
    has_tiny_vae = False  # its latents are one frame of a film's
    comfyui_shift = "*ModelSamplingAuraFlow* with shift 1"
    architecture_name = "qwen-image"
    lora_target_modules = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    )  # fmt: skip

    def guided(self, guidance_scale: float) -> dict[str, Any]:
        off = guidance_scale <= 1
        return {"true_cfg_scale": 1.0} if off else {"true_cfg_scale": guidance_scale, "negative_prompt": NOTHING}

    def unguided(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, Any]:
        return {"true_cfg_scale": 1.0}

    def guide(self, unconditional: Tensor, conditional: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """As in `Family`, then each patch is rescaled to its norm without guidance, as in the stock pipeline."""
        guided = pack(super().guide(unconditional, conditional, guidance_scale))
        norm = pack(conditional).norm(dim=-1, keepdim=True)
        return unpack(guided * (norm / guided.norm(dim=-1, keepdim=True)), conditional)

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        """Embeddings padded to one length, and their mask."""
        longest = self.tokens(options)
        embeds, mask = pipeline.encode_prompt(list(prompts), encoding_device(pipeline), max_sequence_length=longest)
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        missing = longest - embeds.shape[1]
        return Conditioning(
            {"prompt_embeds": F.pad(embeds, (0, 0, 0, missing)), "prompt_embeds_mask": F.pad(mask, (0, missing))}
        )

    def encode_nothing(self, pipeline: DiffusionPipeline, options: PromptOptions) -> Conditioning:
        return self.encode_prompts(pipeline, [NOTHING], options)

    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        tokens, width = self.tokens(options), pipeline.transformer.config.joint_attention_dim
        return {"prompt_embeds": (tokens, width), "prompt_embeds_mask": (tokens,)}

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        embeds, mask = (conditioning.tensors[name] for name in ("prompt_embeds", "prompt_embeds_mask"))
        longest = int(mask.sum(1).max())
        mask = mask[:, :longest]
        output = denoiser(
            hidden_states=pack(x_t).to(embeds.dtype),
            timestep=t / 1000,
            encoder_hidden_states=embeds[:, :longest],
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, x_t.shape[-2] // 2, x_t.shape[-1] // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(output, x_t)

    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        return decode_frame(pipeline, latents)

    def encode(self, pipeline: DiffusionPipeline, images: Tensor) -> Tensor:
        return encode_frame(pipeline, images)


def decode_frame(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    """`Family.decode` by a film's autoencoder, of one frame."""
    vae, (mean, std) = pipeline.vae, _moments(pipeline, latents)
    frames = (latents * std + mean).to(vae.dtype).unsqueeze(2)
    return (vae.decode(frames, return_dict=False)[0][:, :, 0].float() / 2 + 0.5).clamp(0, 1)


def encode_frame(pipeline: DiffusionPipeline, images: Tensor) -> Tensor:
    """`Family.encode` by a film's autoencoder, of one frame."""
    latents = raw_latents(pipeline.vae, images.unsqueeze(2)).squeeze(2)
    mean, std = _moments(pipeline, latents)
    return (latents - mean) / std


def _moments(pipeline: DiffusionPipeline, latents: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the deviation of each channel."""
    config = pipeline.vae.config
    mean, std = (latents.new_tensor(v).reshape(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
    return mean, std
