"""Qwen-Image 2.1: a single-stream transformer on unpacked latents, flow matching, Qwen3-VL as the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DiffusionPipeline, QwenImage21Pipeline
from torch import Tensor

from ..sizes import Resolution
from .base import on_white
from .conditioning import Conditioning, PromptOptions, encoding_device
from .flow import FlowFamily
from .qwen_image import NOTHING, decode_frame, encode_frame


class QwenImage21Family(FlowFamily):
    """Teachers that `QwenImage21Pipeline` loads, as it makes images of text alone.

    The model is meant to be sampled without guidance, which is the default. Guidance is `true_cfg_scale`, against a
    blank prompt. The autoencoder has an alpha channel; images are put on white, and encoded as opaque.

    The stock pipeline reads prompts of any length. Here they are padded to `prompt_tokens`, and longer ones refused.
    The network puts the image behind the longest prompt of a call, so that other samples would not be what they are
    alone. Therefore a call here has prompts of one length only.
    """

    pipeline_class = QwenImage21Pipeline
    prompt_tokens = 512
    extra_encoder_tokens = 16  # of the standing instruction
    mixes_prompts = True
    has_tiny_vae = False  # its latents are one frame of a film's
    comfyui_shift = "*ModelSamplingAuraFlow* with shift 1"
    architecture_name = "qwen-image-2.1"
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0", "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out")

    def guided(self, guidance_scale: float) -> dict[str, Any]:
        off = guidance_scale <= 1
        return {"true_cfg_scale": 1.0} if off else {"true_cfg_scale": guidance_scale, "negative_prompt": NOTHING}

    def unguided(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, Any]:
        return {"true_cfg_scale": 1.0}

    def blank_components(self) -> dict[str, Any]:
        return {"processor": _NoProcessor()}

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        """Embeddings padded to one length, and their mask. Raises ValueError for a prompt that is longer."""
        embeds, mask, _ = pipeline.encode_prompt(list(prompts), device=encoding_device(pipeline))
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        missing = self.prompt_tokens - embeds.shape[1]
        if missing < 0:
            longest = prompts[int(mask.sum(1).argmax())]
            raise ValueError(
                f"A prompt has {embeds.shape[1]} tokens, and at most {self.prompt_tokens} are read; shorten "
                f"{longest[:40]!r}..."
            )
        return Conditioning(
            {"prompt_embeds": F.pad(embeds, (0, 0, 0, missing)), "prompt_embeds_mask": F.pad(mask, (0, missing))}
        )

    def encode_nothing(self, pipeline: DiffusionPipeline, options: PromptOptions) -> Conditioning:
        return self.encode_prompts(pipeline, [NOTHING], options)

    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        width = pipeline.transformer.config.context_in_dim
        return {"prompt_embeds": (self.prompt_tokens, width), "prompt_embeds_mask": (self.prompt_tokens,)}

    def calls(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning, step: Tensor | None
    ) -> Sequence[tuple[Any, ...]]:
        """Neighbours with prompts of one length; with several processes each alone, as shards need equal calls."""
        lengths = conditioning.tensors["prompt_embeds_mask"].sum(1).tolist()
        alone = dist.is_available() and dist.is_initialized()
        starts = [i for i in range(len(lengths)) if alone or i == 0 or lengths[i] != lengths[i - 1]]
        parts = [slice(*ends) for ends in pairwise([*starts, len(lengths)])]
        return [(x_t[p], t[p], conditioning[p], None if step is None else step[p]) for p in parts]

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """As in `Family`, of prompts of one length; see `calls`."""
        embeds, mask = (conditioning.tensors[name] for name in ("prompt_embeds", "prompt_embeds_mask"))
        length, (rows, columns) = int(mask[0].sum()), x_t.shape[-2:]
        # True where the sequence has a place for 2 x 2 latents of an image; here these follow the prompt.
        is_image = torch.arange(length + rows * columns // 4, device=mask.device) >= length
        output = denoiser(
            hidden_states=x_t.flatten(2).transpose(1, 2).to(embeds.dtype),
            timestep=t / 1000,
            encoder_hidden_states=embeds[:, :length],
            img_shapes=[[(1, rows, columns)]] * len(x_t),
            img_mask=is_image.expand(len(x_t), -1),
            return_dict=False,
        )[0]
        return output[:, -rows * columns :].transpose(1, 2).reshape(x_t.shape)

    def latent_shape(self, pipeline: DiffusionPipeline, resolution: Resolution | None) -> tuple[int, int, int]:
        return self.latents_of(pipeline, pipeline.transformer.config.in_channels, resolution or 1024, 2)

    def schedule_length(self, channels: int, height: int, width: int) -> int:
        return height * width

    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        return on_white(decode_frame(pipeline, latents))

    def encode(self, pipeline: DiffusionPipeline, images: Tensor) -> Tensor:
        missing = pipeline.vae.config.in_channels - images.shape[1]
        return encode_frame(pipeline, F.pad(images, (0, 0, 0, 0, 0, missing), value=1.0))


class _NoProcessor:
    """What the pipeline asks its processor for when it is made: the ids of some tokens."""

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        return [[]]

    def encode(self, text: str) -> list[int]:
        return [0]
