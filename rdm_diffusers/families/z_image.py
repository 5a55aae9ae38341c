"""Z-Image: a single-stream transformer, flow matching, Qwen3 as the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ZImagePipeline
from torch import Tensor

from ..sizes import Resolution
from .conditioning import Conditioning, PromptOptions, encoding_device
from .flow import AddedGuidance


class ZImageFamily(AddedGuidance):
    """Teachers that `ZImagePipeline` loads."""

    pipeline_class = ZImagePipeline
    prompt_tokens = 512
    comfyui_shift = "*ModelSamplingAuraFlow* with shift 1"
    architecture_name = "z-image"
    time_embedding_name = "t_embedder"
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        """Embeddings padded to one length, and the length of each."""
        embeds, _ = pipeline.encode_prompt(
            list(prompts), encoding_device(pipeline), do_classifier_free_guidance=False, **options.length
        )
        longest = self.tokens(options)
        padded = torch.stack([F.pad(each, (0, 0, 0, longest - len(each))) for each in embeds])
        lengths = torch.tensor([[len(each)] for each in embeds], device=padded.device)
        return Conditioning({"prompt_embeds": padded, "prompt_length": lengths})

    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        shape = (self.tokens(options), pipeline.transformer.config.cap_feat_dim)
        return {"prompt_embeds": shape, "prompt_length": (1,)}

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        embeds, lengths = (conditioning.tensors[name] for name in ("prompt_embeds", "prompt_length"))
        captions = [each[:length] for each, length in zip(embeds, lengths.flatten().tolist(), strict=True)]
        frames = list(x_t.to(embeds.dtype).unsqueeze(2).unbind(0))
        # The network takes the share of the signal as its time, and predicts x0 - eps.
        outputs = denoiser(frames, 1 - t / 1000, captions, return_dict=False)[0]
        return -torch.stack(list(outputs)).squeeze(2)

    def latent_shape(self, pipeline: DiffusionPipeline, resolution: Resolution | None) -> tuple[int, int, int]:
        return self.latents_of(pipeline, pipeline.transformer.in_channels, resolution or 1024, 2)

    def largest_side(self, pipeline: DiffusionPipeline) -> int | None:
        _, rows, columns = pipeline.transformer.config.axes_lens
        return 2 * min(rows, columns) * pipeline.vae_scale_factor
