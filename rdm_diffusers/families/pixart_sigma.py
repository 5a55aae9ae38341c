"""PixArt-Sigma: a transformer with cross-attention to T5, epsilon prediction; students are full ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline
from torch import Tensor

from .conditioning import Conditioning, PromptOptions, encoding_device
from .sd_unet import StableDiffusionFamily


class PixArtSigmaFamily(StableDiffusionFamily):
    """Teachers that `PixArtSigmaPipeline` loads. It predicts noise and variance; only the noise is used."""

    pipeline_class = PixArtSigmaPipeline
    denoiser_name = "transformer"
    time_embedding_name = "adaln_single.emb"
    load_options = {}
    bins_resolutions = True
    prompt_tokens = 300
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    has_lora = False
    comfyui_keys = None
    architecture_name = "pixart-sigma"

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        embeds, mask, _, _ = pipeline.encode_prompt(
            list(prompts), False, device=encoding_device(pipeline), **options.length
        )
        return Conditioning({"prompt_embeds": embeds, "prompt_attention_mask": mask})

    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        tokens, width = self.tokens(options), pipeline.transformer.config.caption_channels
        return {"prompt_embeds": (tokens, width), "prompt_attention_mask": (tokens,)}

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        embeds, mask = (conditioning.tensors[name] for name in ("prompt_embeds", "prompt_attention_mask"))
        output = denoiser(
            x_t.to(embeds.dtype), encoder_hidden_states=embeds, encoder_attention_mask=mask, timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip
        return output[:, : x_t.shape[1]]
