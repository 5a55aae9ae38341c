"""What families of flow matching share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, SchedulerMixin
from torch import Tensor

from ..sizes import Resolution
from .base import Family
from .conditioning import PromptOptions


class FlowFamily(Family):
    """Transformers that predict the flow `eps - x0`; their students are sampled on the even grid."""

    denoiser_name = "transformer"
    time_embedding_name = "time_text_embed"
    comfyui_keys: Literal["kohya", "stability", "diffusers", "joint"] | None = "diffusers"

    def prediction_type(self, scheduler: SchedulerMixin) -> str:
        return "flow_prediction"

    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        return (vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def stock_scheduler(
        self,
        teacher_scheduler: SchedulerMixin,
        num_student_steps: int,
        eta: float = 1.0,
        grid: Sequence[float] = (),
    ) -> SchedulerMixin:
        """As in `Family`; its own sigmas are 1, 1 - 1/K, ..., 1/K, whatever shift the teacher is sampled with."""
        last = grid[-1] if grid else 1 / num_student_steps
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=teacher_scheduler.config.num_train_timesteps,
            shift_terminal=last if num_student_steps > 1 else None,  # one sigma of 1 would divide 0 by 0
            stochastic_sampling=bool(eta),
        )


class PackedFlowFamily(FlowFamily):
    """Transformers that take latents as rows of patches of 2 x 2, see `pack`."""

    def latent_shape(self, pipeline: DiffusionPipeline, resolution: Resolution | None) -> tuple[int, int, int]:
        factor, channels = pipeline.vae_scale_factor, pipeline.transformer.config.in_channels // 4
        return self.latents_of(pipeline, channels, resolution or pipeline.default_sample_size * factor, 2)


class AddedGuidance(FlowFamily):
    """For stock pipelines whose `guidance_scale` g means c + g (c - u), so that 0 is off and w = g + 1."""

    @property
    def default_guidance_scale(self) -> float:
        """As in `Family`: w, not g."""
        return super().default_guidance_scale + 1.0

    def guided(self, guidance_scale: float) -> dict[str, Any]:
        return {"guidance_scale": max(guidance_scale - 1.0, 0.0)}


class EmbeddedGuidance:
    """For families of which some denoisers are guidance-distilled: their configuration says `guidance_embeds`."""

    def unguided(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, Any]:
        """For a guidance-distilled teacher, the guidance that the student was trained with."""
        return {"guidance_scale": (options.embedded_guidance or 0.0) if self.embeds_guidance(pipeline) else 0.0}

    def embeds_guidance(self, pipeline: DiffusionPipeline) -> bool:
        """As in `Family`."""
        return bool(pipeline.transformer.config.guidance_embeds)


def guidance_input(embeds: Tensor, options: PromptOptions) -> Tensor:
    """The guidance as an input of a denoiser, `[B, 1]`, for B prompts' embeddings."""
    return torch.full((len(embeds), 1), options.embedded_guidance or 0.0, device=embeds.device)


def pack(latents: Tensor) -> Tensor:
    """Latents as rows of patches of 2 x 2: `[B, C, H, W]` -> `[B, (H / 2) (W / 2), 4 C]`."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpack(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `pack`, to the shape of `like [B, C, H, W]`."""
    return FluxPipeline._unpack_latents(rows, *like.shape[-2:], vae_scale_factor=1)
