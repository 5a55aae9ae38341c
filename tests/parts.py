"""Tiny real components, made offline from configurations, and the command lines of tiny runs."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from rdm_diffusers.config import RunConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.distillation import RewardEstimate
from rdm_diffusers.families import Conditioning, Teacher
from rdm_diffusers.families.sd_unet import StableDiffusionFamily
from rdm_diffusers.networks import FAKE_SCORE, STUDENT, SharedBase
from rdm_diffusers.prediction import NoiseSchedule
from rdm_diffusers.tiny.captions import CAPTIONS, MAX_TOKENS, make_tokenizer
from rdm_diffusers.training import trainer as trainer_module
from rdm_diffusers.training.assembly import load
from rdm_diffusers.training.loop import train
from rdm_diffusers.training.trainer import Trainer

TEXT_DIM = 16
PROMPTS = CAPTIONS[7::50]


def make_unet(seed: int = 0, width: int = 32) -> UNet2DConditionModel:
    """A conditional U-Net of two levels on 4 x 8 x 8 latents."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(width, width),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def make_noise_scheduler(**changes) -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    options = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return DDIMScheduler(**{**options, "set_alpha_to_one": False, "steps_offset": 1, **changes})


def make_pipeline(seed: int = 0, width: int = 16) -> StableDiffusionPipeline:
    """A whole Stable Diffusion pipeline for 32 x 32 pictures, untrained."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_DIM, intermediate_size=TEXT_DIM, projection_dim=TEXT_DIM,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        sample_size=32, mid_block_add_attention=False,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer, unet=make_unet(seed, width),
        scheduler=make_noise_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def run_arguments(teacher: Path | str, prompts_file: Path, output_dir: Path, **changes) -> list[str]:
    """The command line of a run of two updates, eight samples each, that takes about a second.

    A change may be a value, a list of them for a flag that is repeated, True for a switch, or None for a flag left out.
    """
    options: dict = dict(
        pretrained_model_name_or_path=teacher, prompts_file=prompts_file, output_dir=output_dir, report_to="none",
        max_train_steps=2, train_batch_size=8, group_size=4, num_student_steps=2, guidance_scale=2.0, rank=2,
        teacher_target="score", learning_rate=1e-2, num_validation_images=2, validation_steps=1000, num_eval_images=0,
        monitor_images=0,
    )  # fmt: skip
    words = []
    for name, value in {**options, **changes}.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name}"] if one is True else [] if one is None else [f"--{name}", str(one)]
    return words


def make_shared(
    fold: bool = False, checkpointing: bool = False, guidance_scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> SharedBase:
    """One tiny base with two different adapters, always of the same numbers."""
    unet = make_unet().to(dtype)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    config = LoraConfig(
        r=4, target_modules=list(StableDiffusionFamily.lora_target_modules), init_lora_weights="gaussian"
    )
    null = make_conditioning(1, seed=9, dtype=dtype)
    schedule = NoiseSchedule.from_scheduler(make_noise_scheduler())
    torch.manual_seed(1)
    networks = SharedBase(
        unet, config, fold_adapters=fold, family=StableDiffusionFamily(), schedule=schedule,
        prediction_type="epsilon", null_conditioning=null, guidance_scale=guidance_scale,
    )  # fmt: skip
    randomise_adapters(networks)
    return networks


@torch.no_grad()
def randomise_adapters(networks: SharedBase) -> None:
    """Gives both adapters a part in the output; fresh ones have none, because B starts at 0."""
    generator = torch.Generator().manual_seed(2)
    for role in (STUDENT, FAKE_SCORE):
        for parameter in networks.parameters(role):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def make_conditioning(batch: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Conditioning:
    """Random prompt embeddings."""
    generator = torch.Generator().manual_seed(seed)
    return Conditioning({"prompt_embeds": torch.randn(batch, 5, TEXT_DIM, generator=generator).to(dtype)})


def make_estimate(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, **known) -> RewardEstimate:
    """An estimate of R_dm, at variance-preserving scales of tau a half unless they are known."""
    ones = torch.ones(len(x0), dtype=x0.dtype)
    sigma = known.get("sigma", ones / 2)
    usual = dict(alpha=(1 - sigma**2).sqrt(), sigma=sigma, tau=ones / 2, step=torch.zeros(len(x0), dtype=torch.int64))
    return RewardEstimate(x0, teacher_x0, fake_x0, **{**usual, **known})


def relative_error(value: Tensor | list[Tensor], reference: Tensor | list[Tensor]) -> float:
    """|value - reference| / |reference|, over all elements."""
    value, reference = (torch.cat([v.flatten().double() for v in vs]) for vs in (value, reference))
    return float((value - reference).norm() / reference.norm())


def make_run(argv: list[str], student: str = "lora") -> Trainer:
    """What the scripts load before the loop; in float64 inside `in_float64`. The folder is not held."""
    trainer = Trainer(parse_args(argv, student=student))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "locked_for_run", lambda *args, **kwargs: nullcontext())
        for step in ("checkpoint_to_resume", "check_with_teacher"):
            patch.setattr(trainer_module, step, lambda *args: None)
        patch.setattr(trainer_module, "load", load_in_default_dtype)
        trainer.load()
    return trainer


def load_in_default_dtype(config: RunConfig, device: torch.device) -> Teacher:
    """The teacher, in float64 where that is torch's default."""
    teacher = load(config, device)
    if torch.get_default_dtype() == torch.float64:
        for part in teacher.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                torch.nn.Module.double(part)
    return teacher


def change(trainer: Trainer, subject: str, **values) -> None:
    """Gives a run other values of a subject of its configuration."""
    trainer.config = trainer.config.changed(subject, **values)
    trainer.arguments |= values


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Makes the system refuse to write larger files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def read_state(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by file and name: `student/parameter/0`, `statistics/tilted_weight`."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def train_run(trainer: Trainer, validate: Callable[[int], None] = lambda update: None) -> int:
    """The real loop on what `make_run` made."""
    trainer.validate = lambda: validate(trainer.state.update)  # type: ignore[method-assign]
    return train(trainer)


def train_only(argv: list[str], student: str = "lora") -> None:
    """Trains and exports as the scripts do, but draws nothing at the end."""
    with Trainer(parse_args(argv, student=student)) as trainer:
        assert trainer.train().signal == 0
        trainer.export()
