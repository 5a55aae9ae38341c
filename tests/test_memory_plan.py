"""`--dry_run`: real-size teachers are planned from their configurations alone, and the plan is what is then needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from parts import run_arguments
from parts_families import CALLS, MAKERS, make_pipeline
from parts_sd3 import make_shared
from torch import Tensor
from transformers import CLIPTextConfig, Qwen2_5_VLConfig, T5Config

import train_rdm_lora
from rdm_diffusers.families import FAMILIES, PromptOptions, Teacher
from rdm_diffusers.networks import STUDENT
from rdm_diffusers.training.arguments import parse_args
from rdm_diffusers.training.memory_plan import MemoryPlan, plan_memory

CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
CLIP_G = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
    hidden_act="gelu",
)  # fmt: skip
T5_XXL = dict(
    d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", vocab_size=32128
)
BLOCKS = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
)  # fmt: skip
SDXL_UNET = dict(
    sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
SD35_LARGE = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=38, attention_head_dim=64,
    num_attention_heads=38, joint_attention_dim=4096, caption_projection_dim=2432, pooled_projection_dim=2048,
    pos_embed_max_size=192, qk_norm="rms_norm",
)  # fmt: skip
CLIPS = {
    "text_encoder": ("CLIPTextModel", CLIPTextConfig(**CLIP_L)),
    "text_encoder_2": ("CLIPTextModelWithProjection", CLIPTextConfig(**CLIP_G)),
}
# The components, and how many billions of parameters the denoiser and all text encoders are known to have.
TEACHERS = {
    "StableDiffusionXLPipeline": (
        {"unet": (UNet2DConditionModel, SDXL_UNET), "vae": (AutoencoderKL, BLOCKS), **CLIPS}, 2.567, 0.817,
    ),
    "StableDiffusion3Pipeline": (
        {
            "transformer": (SD3Transformer2DModel, SD35_LARGE),
            "vae": (AutoencoderKL, {**BLOCKS, "latent_channels": 16}),
            **CLIPS, "text_encoder_3": ("T5EncoderModel", T5Config(**T5_XXL)),
        },
        8.06, 5.58,
    ),
    "FluxPipeline": (
        {
            "transformer": (FluxTransformer2DModel, {"guidance_embeds": True}),
            "vae": (AutoencoderKL, {**BLOCKS, "latent_channels": 16}),
            "text_encoder": CLIPS["text_encoder"], "text_encoder_2": ("T5EncoderModel", T5Config(**T5_XXL)),
        },
        11.9, 4.89,
    ),
    "QwenImagePipeline": (
        {
            "transformer": (QwenImageTransformer2DModel, {}), "vae": (AutoencoderKLQwenImage, {}),
            "text_encoder": ("Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLConfig()),
        },
        20.4, None,
    ),
}  # fmt: skip


def write_configs(name: str, folder: Path) -> Path:
    """The folder of a real-size teacher, without any weights."""
    index: dict = {"_class_name": name, "_diffusers_version": "0.36.0"}
    for part, (kind, settings) in TEACHERS[name][0].items():
        if isinstance(kind, str):
            settings.save_pretrained(folder / part)
            index[part] = ["transformers", kind]
        else:
            (folder / part).mkdir(parents=True)
            (folder / part / "config.json").write_text(json.dumps({"_class_name": kind.__name__, **settings}))
            index[part] = ["diffusers", kind.__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", TEACHERS)
def test_real_size_teachers_are_planned_without_weights(
    name: str, tmp_path: Path, prompts_file: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, (parts, denoiser, encoders) = write_configs(name, tmp_path / "teacher"), TEACHERS[name]
    train_rdm_lora.main(
        ["--pretrained_model", str(folder), "--prompts_file", str(prompts_file), "--output_dir", str(tmp_path / "out"),
         "--rank", "64", "--train_batch_size", "4", "--mixed_precision", "bf16", "--use_8bit_adam", "--dry_run"]
    )  # fmt: skip
    said = capsys.readouterr().out
    counts = {part: float(count.replace(",", "")) / 1e3 for part, count in re.findall(r"(\w+) +([\d,.]+) M par", said)}
    sizes = {what.strip(): float(size.replace(",", "")) for what, size in re.findall(r"(.+?) {2,}([\d,.]+) GiB", said)}
    component = FAMILIES[name].denoiser_name
    assert counts[component] == pytest.approx(denoiser, rel=0.01)
    if encoders is not None:
        assert sum(count for part, count in counts.items() if "encoder" in part) == pytest.approx(encoders, rel=0.02)
    assert 0.05 < counts["lora"] < 0.1 * denoiser
    assert sizes[f"{component}, frozen"] == pytest.approx(2 * denoiser * 1e9 / 2**30, rel=0.01)
    assert sizes["activations of 4 samples"] > 10
    assert set(counts) == {*parts, "lora"}


def kept_by_forward(teacher: Teacher, x_t: Tensor) -> int:
    """Bytes that the student's forward really keeps for its backward."""
    networks = make_shared(teacher)
    own = {parameter.untyped_storage()._cdata for parameter in teacher.denoiser.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor, storage.nbytes()
        return tensor

    conditioning = teacher.encode_prompts(["a red seven on a blue background"] * len(x_t))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        networks.predict(STUDENT, x_t, torch.full((len(x_t),), 500), conditioning)
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("name", [name for name in MAKERS if FAMILIES[name].has_lora])
def test_the_planned_activations_are_what_a_forward_keeps(name: str, tmp_path: Path) -> None:
    make_pipeline(name).save_pretrained(tmp_path)
    options = PromptOptions(CALLS.get(name, {}).get("max_sequence_length"), CALLS.get(name, {}).get("height"), 3.5)
    words = ["--pretrained_model", str(tmp_path), "--train_batch_size", "8", "--rank", "2", "--lora_alpha", "4"]
    for flag, value in (("max_sequence_length", options.max_sequence_length), ("resolution", options.resolution)):
        words += [f"--{flag}", str(value)] if value is not None else []
    args = parse_args(words)
    planned = plan_memory(args)
    teacher = Teacher(make_pipeline(name), FAMILIES[name], name, options)
    measured = kept_by_forward(
        teacher, torch.randn(8, *teacher.family.latent_shape(teacher.pipeline, options.resolution))
    )
    assert isinstance(planned, MemoryPlan)
    assert planned.sizes["activations of 8 samples"] == pytest.approx(measured, rel=0.15)


def test_a_dry_run_checks_the_arguments_and_trains_nothing(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train_rdm_lora.main([*run_arguments(teacher_folder, prompts_file, tmp_path), "--dry_run"])
    assert "two optimisers" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.safetensors"))
