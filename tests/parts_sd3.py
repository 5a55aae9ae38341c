"""Tiny real Stable Diffusion 3 components, made offline, and a student of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from parts import randomise_adapters
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from rdm_diffusers.families import PromptOptions, Teacher, load_teacher
from rdm_diffusers.hub import export_lora
from rdm_diffusers.networks import SharedBase
from rdm_diffusers.schedulers import RdmScheduler
from rdm_diffusers.tiny.captions import MAX_TOKENS, make_tokenizer

TEXT_DIMS = (16, 8)
JOINT_DIM = 32  # the width of T5, to which the CLIP embeddings are padded
TOKENS = 3  # max_sequence_length where the stock default would not do


def make_sd3_pipeline(seed: int = 0, third_encoder: bool = False, **scheduler) -> StableDiffusion3Pipeline:
    """A whole Stable Diffusion 3 pipeline for 32 x 32 pictures, untrained, with one dual-attention block as in 3.5."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=JOINT_DIM,
        pooled_projection_dim=sum(TEXT_DIMS), pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        sample_size=32, mid_block_add_attention=False, scaling_factor=1.5, shift_factor=0.1,
    )  # fmt: skip
    encoders = [CLIPTextModelWithProjection(text_config(tokenizer, dim)).eval() for dim in TEXT_DIMS]
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(**scheduler), vae=vae.eval(),
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer,
        text_encoder_3=t5() if third_encoder else None, tokenizer_3=t5_tokenizer() if third_encoder else None,
    )  # fmt: skip


def text_config(tokenizer, dim: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=dim, intermediate_size=dim, projection_dim=dim,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=JOINT_DIM, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()  # fmt: skip


def t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def make_shared(
    teacher: Teacher, guidance_scale: float = 1.0, rank: int = 2, alpha: int = 4, more_layers: Sequence[str] = ()
) -> SharedBase:
    """The three roles on a loaded teacher, with two different adapters that are always of the same numbers."""
    layers = [*teacher.family.lora_target_modules, *more_layers]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, init_lora_weights="gaussian")
    torch.manual_seed(1)
    networks = SharedBase(
        teacher.denoiser, config, family=teacher.family, schedule=teacher.schedule,
        prediction_type=teacher.prediction_type, null_conditioning=teacher.encode_nothing(),
        guidance_scale=guidance_scale,
    )  # fmt: skip
    randomise_adapters(networks)
    return networks


def rdm_scheduler(steps: int, eta: float) -> RdmScheduler:
    """The student's sampler on the even grid."""
    return RdmScheduler(
        prediction_type="flow_prediction", eta=eta, student_sigmas=[(steps - i) / steps for i in range(steps)]
    )


def make_student(teacher_folder: Path | str, folder: Path, steps: int, eta: float) -> Path:
    """A LoRA student of the teacher in `teacher_folder`, exported into `folder`."""
    teacher = load_teacher(str(teacher_folder), torch.float32, options=PromptOptions(TOKENS))
    folder.mkdir(exist_ok=True)
    export_lora(folder, teacher, make_shared(teacher).student_weights(), rdm_scheduler(steps, eta))
    return folder
