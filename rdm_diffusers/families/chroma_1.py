"""Chroma: FLUX.1's transformer without its pooled prompt, flow matching, T5; guided by two calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ChromaPipeline, DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from .conditioning import Conditioning, PromptOptions, encoding_device
from .flow import PackedFlowFamily, pack, unpack


class ChromaFamily(PackedFlowFamily):
    """Teachers that `ChromaPipeline` loads. The network gets the mask that the stock pipeline makes."""

    pipeline_class = ChromaPipeline
    prompt_tokens = 512
    most_prompt_tokens = 512
    comfyui_shift = "*ModelSamplingFlux* with both shifts 0"
    architecture_name = "chroma"
    time_embedding_name = "distilled_guidance_layer"
    lora_target_modules = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
    )  # fmt: skip

    def checkpoint(self, denoiser: ModelMixin, run: Callable[..., Any] | None = None) -> None:
        """As in `Family`, with the mask also in the blocks of one stream, where diffusers leaves it out."""
        super().checkpoint(denoiser, run)
        denoiser._gradient_checkpointing_func = _with_mask(denoiser._gradient_checkpointing_func)

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        """Embeddings of one length, and their mask, which includes one token of the padding."""
        embeds, _, mask, *_ = pipeline.encode_prompt(
            list(prompts), device=encoding_device(pipeline), do_classifier_free_guidance=False, **options.length
        )
        return Conditioning({"prompt_embeds": embeds, "prompt_attention_mask": mask})

    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        tokens, width = self.tokens(options), pipeline.transformer.config.joint_attention_dim
        return {"prompt_embeds": (tokens, width), "prompt_attention_mask": (tokens,)}

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        embeds, mask = (conditioning.tensors[name] for name in ("prompt_embeds", "prompt_attention_mask"))
        patches = pack(x_t).to(embeds.dtype)
        rows, columns = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        output = denoiser(
            hidden_states=patches,
            timestep=t / 1000,
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=ChromaPipeline._prepare_latent_image_ids(len(x_t), rows, columns, x_t.device, embeds.dtype),
            attention_mask=torch.cat([mask, mask.new_ones(patches.shape[:2])], dim=1),
            return_dict=False,
        )[0]
        return unpack(output, x_t)


def _with_mask(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run(block, *inputs)`, in which a block without a mask gets that of the blocks of two streams before it."""
    mask: Tensor | None = None

    def recomputed(block: nn.Module, *inputs: Any) -> Any:
        nonlocal mask
        if hasattr(block, "norm1_context"):  # of two streams
            mask = inputs[-1]
        elif len(inputs) == 3:
            inputs = (*inputs, mask)
        return run(block, *inputs)

    return recomputed
