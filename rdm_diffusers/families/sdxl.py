"""Stable Diffusion XL: a U-Net conditioned on two CLIP text encoders and on the image's size and crop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from ..sizes import Resolution, height_and_width
from .conditioning import Conditioning, PromptOptions, encoding_device
from .sd_unet import StableDiffusionFamily


class StableDiffusionXLFamily(StableDiffusionFamily):
    """Teachers that `StableDiffusionXLPipeline` loads. Images are conditioned on their own size, uncropped."""

    pipeline_class = StableDiffusionXLPipeline
    load_options = {}
    comfyui_keys = "stability"
    architecture_name = "stable-diffusion-xl-v1-base"
    kohya_base_version = "sdxl_base_v1-0"  # AUTOMATIC1111's web UI recognises SDXL by it

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), device=encoding_device(pipeline), do_classifier_free_guidance=False
        )
        return self._conditioning(pipeline, embeds, pooled, options)

    @torch.no_grad()
    def encode_nothing(self, pipeline: DiffusionPipeline, options: PromptOptions) -> Conditioning:
        """Zeros for teachers with `force_zeros_for_empty_prompt`, else the empty prompt."""
        _, embeds, _, pooled = pipeline.encode_prompt(
            [""], device=encoding_device(pipeline), do_classifier_free_guidance=True
        )
        return self._conditioning(pipeline, embeds, pooled, options)

    def _conditioning(
        self, pipeline: DiffusionPipeline, embeds: Tensor, pooled: Tensor, options: PromptOptions
    ) -> Conditioning:
        _, height, width = self.latent_shape(pipeline, options.resolution)
        size = (height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor)
        ids = pipeline._get_add_time_ids(size, (0, 0), size, embeds.dtype, pooled.shape[-1]).to(embeds.device)
        return Conditioning(
            {"prompt_embeds": embeds, "text_embeds": pooled, "time_ids": ids.expand(len(embeds), -1).clone()}
        )

    def at_size(self, pipeline: DiffusionPipeline, conditioning: Conditioning, resolution: Resolution) -> Conditioning:
        size, ids = height_and_width(resolution), conditioning.tensors["time_ids"]
        return Conditioning({**conditioning.tensors, "time_ids": ids.new_tensor([*size, 0, 0, *size]).expand_as(ids)})

    def unconditional(self, nothing: Conditioning, conditioning: Conditioning) -> Conditioning:
        """As in `Family`; size and crop are the prompts' own, as in the stock pipeline."""
        expanded = super().unconditional(nothing, conditioning).tensors
        return Conditioning({**expanded, "time_ids": conditioning.tensors["time_ids"]})

    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        config, tokens = pipeline.unet.config, pipeline.text_encoder_2.config.max_position_embeddings
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {"prompt_embeds": (tokens, config.cross_attention_dim), "text_embeds": (pooled,), "time_ids": (6,)}

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        embeds = conditioning.tensors["prompt_embeds"]
        added = {name: conditioning.tensors[name] for name in ("text_embeds", "time_ids")}
        return denoiser(x_t.to(embeds.dtype), t, embeds, added_cond_kwargs=added, return_dict=False)[0]

    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        mean, std = _moments(pipeline, latents)
        return super().decode(pipeline, latents * std + mean)

    def encode(self, pipeline: DiffusionPipeline, images: Tensor) -> Tensor:
        latents = super().encode(pipeline, images)
        mean, std = _moments(pipeline, latents)
        return (latents - mean) / std


def _moments(pipeline: DiffusionPipeline, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """The mean, scaled, and the deviation of each channel, if the autoencoder states them; else 0 and 1."""
    config = pipeline.vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return 0.0, 1.0
    means, stds = (latents.new_tensor(values).reshape(1, -1, 1, 1) for values in (mean, std))
    return means * config.scaling_factor, stds
