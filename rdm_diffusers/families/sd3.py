"""Stable Diffusion 3 and 3.5: a transformer of joint attention, flow matching, two CLIP text encoders and T5."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin, StableDiffusion3Pipeline
from torch import Tensor

from .base import Conditioning, Family


class StableDiffusion3Family(Family):
    """Teachers that `StableDiffusion3Pipeline` loads, with or without the third text encoder."""

    pipeline_class = StableDiffusion3Pipeline
    denoiser_name = "transformer"
    time_embedding_name = "time_text_embed"
    lora_target_modules = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], max_sequence_length: int | None = None
    ) -> Conditioning:
        length = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        embeds, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, None, pipeline._execution_device, do_classifier_free_guidance=False, **length
        )
        return Conditioning({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        embeds, pooled = (conditioning.tensors[name] for name in ("prompt_embeds", "pooled_prompt_embeds"))
        return denoiser(x_t.to(embeds.dtype), embeds, pooled, t, return_dict=False)[0]

    def latent_shape(self, pipeline: DiffusionPipeline, resolution: int | None) -> tuple[int, int, int]:
        config, factor = pipeline.transformer.config, pipeline.vae_scale_factor
        resolution = resolution or config.sample_size * factor
        if resolution % (factor * config.patch_size):
            raise ValueError(
                f"--resolution is {resolution}; this teacher needs a multiple of {factor * config.patch_size}."
            )
        return config.in_channels, resolution // factor, resolution // factor

    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return (vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def stock_scheduler(
        self, teacher_scheduler: SchedulerMixin, num_student_steps: int, eta: float = 1.0
    ) -> SchedulerMixin:
        """As in `Family`; its sigmas are 1, 1 - 1/K, ..., 1/K, whatever shift the teacher is sampled with."""
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=teacher_scheduler.config.num_train_timesteps,
            shift_terminal=1 / num_student_steps if num_student_steps > 1 else None,  # 1 would divide 0 by 0
            stochastic_sampling=bool(eta),
        )
