"""Stable Diffusion 1.x and 2.x: a U-Net on VAE latents, conditioned on one CLIP text encoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
)
from torch import Tensor

from .base import Family
from .conditioning import Conditioning, PromptOptions, encoding_device

TEXT_WIDTH_2 = 1024  # of Stable Diffusion 2's text encoder; that of 1 is 768


class StableDiffusionFamily(Family):
    """Teachers that `StableDiffusionPipeline` loads."""

    pipeline_class = StableDiffusionPipeline
    denoiser_name = "unet"
    stock_multiple = 8
    time_embedding_name = "time_embedding"
    load_options = {"safety_checker": None, "requires_safety_checker": False}
    comfyui_keys: Literal["kohya", "stability", "diffusers", "joint"] | None = "kohya"
    architecture_name = "stable-diffusion-v1"
    lora_target_modules: tuple[str, ...] = (
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
        "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
    )  # fmt: skip

    def architecture(self, text_width: int | None, prediction_type: str) -> str:
        if text_width != TEXT_WIDTH_2:
            return self.architecture_name
        return "stable-diffusion-v2-768-v" if prediction_type == "v_prediction" else "stable-diffusion-v2-512"

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(
            list(prompts), encoding_device(pipeline), num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditioning({"prompt_embeds": embeds})

    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        tokens = pipeline.text_encoder.config.max_position_embeddings
        return {"prompt_embeds": (tokens, pipeline.unet.config.cross_attention_dim)}

    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        embeds = conditioning.tensors["prompt_embeds"]
        return denoiser(x_t.to(embeds.dtype), t, embeds, return_dict=False)[0]

    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def stock_scheduler(
        self,
        teacher_scheduler: SchedulerMixin,
        num_student_steps: int,
        eta: float = 1.0,
        grid: Sequence[float] = (),
    ) -> SchedulerMixin:
        usual: Any = LCMScheduler if eta else DDIMScheduler
        kind = usual
        own: dict[str, Any] = {"original_inference_steps": num_student_steps} if eta else {"set_alpha_to_one": True}
        if grid and eta:  # any timestep may be told, and even at timestep 1 the network's x0 is taken as it is
            own = {"original_inference_steps": len(teacher_scheduler.alphas_cumprod), "timestep_scaling": 1e4}
        elif grid:  # DDIMScheduler takes no timesteps; of order 1 this one is the same
            kind, own = DPMSolverMultistepScheduler, {"solver_order": 1}
        accepted, known = (inspect.signature(each.__init__).parameters for each in (usual, kind))
        config = {name: value for name, value in teacher_scheduler.config.items() if name in accepted}
        config |= {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False}
        config |= {"steps_offset": 1}  # stock pipelines insist on it; trailing grids do not use it
        return kind.from_config({name: value for name, value in config.items() if name in known}, **own)
