"""Runs for measurements: assembled as the scripts assemble them, on teachers of real sizes with random weights."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from runs import words_of
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from rdm_diffusers.config import RunConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.families import Conditioning, Teacher
from rdm_diffusers.networks import Networks
from rdm_diffusers.tiny import is_tiny
from rdm_diffusers.tiny.captions import CAPTIONS, make_tokenizer
from rdm_diffusers.training.assembly import networks_of_run
from rdm_diffusers.training.loop import train
from rdm_diffusers.training.trainer import Trainer

CLIP_TOKENS = 77
NEVER = 10**9
QUIET: dict[str, Any] = dict(
    report_to="none", num_eval_images=0, monitor_images=0, validation_steps=NEVER, checkpointing_steps=NEVER
)
SDXL_BLOCKS = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    addition_embed_type="text_time", use_linear_projection=True,
)  # fmt: skip

# The networks by name: their published configurations, and the changes of `small`, which make them fast on a CPU.
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd15": (
        dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768),
        dict(sample_size=8, block_out_channels=(32, 32, 32, 32), cross_attention_dim=64, layers_per_block=1),
    ),
    "sd_mid": (  # our own, a tenth of sd15
        dict(sample_size=64, block_out_channels=(128, 256, 384, 384), cross_attention_dim=384),
        dict(sample_size=8, block_out_channels=(32, 32, 32, 32), cross_attention_dim=32),
    ),
    "sdxl": (
        dict(
            sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20), cross_attention_dim=2048, addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816, **SDXL_BLOCKS,
        ),
        dict(
            sample_size=8, block_out_channels=(32, 32, 32), transformer_layers_per_block=(1, 1, 1),
            attention_head_dim=(2, 2, 2), cross_attention_dim=32, addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        ),
    ),
    "sd35_medium": (
        dict(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
            pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
        ),
        dict(
            sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=64,
            caption_projection_dim=32, pooled_projection_dim=32, dual_attention_layers=(0,),
        ),
    ),
    "sd35_large": (
        dict(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=38, attention_head_dim=64,
            num_attention_heads=38, joint_attention_dim=4096, caption_projection_dim=2432, pooled_projection_dim=2048,
            pos_embed_max_size=192, qk_norm="rms_norm",
        ),
        dict(
            sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=64,
            caption_projection_dim=32, pooled_projection_dim=32,
        ),
    ),
    "flux": (
        dict(
            in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
            joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
        ),
        dict(
            num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
            pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        ),
    ),
}  # fmt: skip


NETWORKS["sd15_whole"] = NETWORKS["sd15"]  # with the autoencoder of Stable Diffusion, for rewards

NetworksMaker = Callable[[RunConfig, Teacher, Conditioning, Accelerator], Networks]


class Run(Trainer):
    """A run that makes one update at a time.

    Args:
        config: the run's.
        maker: makes other networks than the run's own.
    """

    def __init__(self, config: RunConfig, maker: NetworksMaker = networks_of_run) -> None:
        super().__init__(config)
        self.maker = maker

    def make_networks(self) -> Networks:
        return self.maker(self.config, self.teacher, self.texts.nothing, self.accelerator)

    def update(self) -> None:
        """One update by the real loop: rollout, both updates, both optimisers' steps, averages and alarms."""
        self.config = self.config.changed("optimisation", max_train_steps=self.state.update + 1)
        with contextlib.redirect_stderr(io.StringIO()):  # the loop's progress bar
            train(self)


def command_line(teacher: Path | str, work_dir: Path, **flags: Any) -> list[str]:
    """Flags of the training scripts, as `words_of`."""
    words = ["--pretrained_model_name_or_path", str(teacher)]
    words += ["--output_dir", str(work_dir / "run"), "--cache_dir", str(work_dir / "cache")]
    if not is_tiny(str(teacher)):
        work_dir.mkdir(parents=True, exist_ok=True)
        prompts = work_dir / "prompts.txt"
        prompts.write_text("\n".join(CAPTIONS[:16]) + "\n")
        words += ["--prompts_file", str(prompts)]
    return words + words_of({**QUIET, **flags})


def make_run(argv: list[str], student: str = "lora", maker: NetworksMaker = networks_of_run) -> Run:
    """A loaded run of `train_rdm_lora.py` or `train_rdm_full.py`, with its own networks or others."""
    run = Run(parse_args(argv, student=student), maker)
    run.load()
    return run


@dataclass(frozen=True)
class Cost:
    """Seconds of the clock, and of the processor, which excludes other programs."""

    wall: float
    cpu: float


def cost(work: Callable[[], Any]) -> Cost:
    """The cost of some work, which includes waiting for a GPU."""
    _synchronise()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    _synchronise()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def software() -> dict[str, Any]:
    """The software that the numbers depend on."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpus": os.cpu_count()}


def save_teacher(name: str, folder: Path, dtype: torch.dtype = torch.float32, small: bool = False) -> Path:
    """Writes a stock pipeline with a network of `NETWORKS` with random weights; its other parts are tiny.

    Text encoders are shallow but have the real width and number of tokens, so that the network costs as much as the
    real one.
    """
    full, shrunken = NETWORKS[name]
    config = {**full, **(shrunken if small else {})}
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            pipeline = MAKERS[name](config)
    finally:
        torch.set_default_dtype(default)
    pipeline.save_pretrained(folder)
    return folder


def _make_sd(config: dict[str, Any]) -> DiffusionPipeline:
    width = config["cross_attention_dim"]
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(**config), vae=_vae(4), scheduler=_noise_scheduler(), tokenizer=_clip_tokenizer(),
        text_encoder=_clip(CLIPTextModel, width), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def _make_sd_whole(config: dict[str, Any]) -> DiffusionPipeline:
    pipeline = _make_sd(config)
    if config["block_out_channels"] == NETWORKS["sd15"][1]["block_out_channels"]:  # small
        return pipeline
    pipeline.vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return pipeline


def _make_sdxl(config: dict[str, Any]) -> DiffusionPipeline:
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(**config), vae=_vae(4), scheduler=_noise_scheduler(),
        tokenizer=_clip_tokenizer(), text_encoder=_clip(CLIPTextModel, config["cross_attention_dim"] - pooled),
        tokenizer_2=_clip_tokenizer(), text_encoder_2=_clip(CLIPTextModelWithProjection, pooled),
    )  # fmt: skip


def _make_sd3(config: dict[str, Any]) -> DiffusionPipeline:
    first = config["pooled_projection_dim"] * 3 // 8
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**config), vae=_vae(16), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=_clip_tokenizer(), text_encoder=_clip(CLIPTextModelWithProjection, first),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection, config["pooled_projection_dim"] - first),
        tokenizer_3=_t5_tokenizer(), text_encoder_3=_t5(config["joint_attention_dim"]),
    )  # fmt: skip


def _make_flux(config: dict[str, Any]) -> DiffusionPipeline:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(**config), vae=_vae(16),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        tokenizer=_clip_tokenizer(), text_encoder=_clip(CLIPTextModel, config["pooled_projection_dim"]),
        tokenizer_2=_t5_tokenizer(), text_encoder_2=_t5(config["joint_attention_dim"]),
    )  # fmt: skip


MAKERS = {
    "sd15": _make_sd, "sd15_whole": _make_sd_whole,
    "sd_mid": _make_sd, "sdxl": _make_sdxl, "sd35_medium": _make_sd3, "sd35_large": _make_sd3,
    "flux": _make_flux,
}  # fmt: skip


def _noise_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=channels,
        mid_block_add_attention=False, shift_factor=0.1,
    )  # fmt: skip


def _clip_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = CLIP_TOKENS
    return tokenizer


def _clip(kind: type, width: int):
    tokenizer = make_tokenizer()
    return kind(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def _t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
