"""Real-size teachers as folders of configurations alone: their published settings, without any weights."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    Gemma2Config,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
    T5Config,
)

# --- text encoders -----------------------------------------------------------------------------------------------
CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
)  # fmt: skip
CLIP_G = CLIPTextConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
    hidden_act="gelu",
)  # fmt: skip
T5_XXL = T5Config(
    d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", vocab_size=32128,
)  # fmt: skip
GEMMA_2B = Gemma2Config(
    vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256,
)  # fmt: skip
QWEN3_4B = Qwen3Config(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
QWEN3_8B = Qwen3Config(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128,
)  # fmt: skip
QWEN_VL_7B = Qwen2_5_VLConfig(
    text_config=dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, rope_scaling={"mrope_section": [16, 24, 24], "rope_type": "default"},
    ),
    vision_config=dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584,
        fullatt_block_indexes=[7, 15, 23, 31],
    ),
    tie_word_embeddings=False,
)  # fmt: skip
MISTRAL_24B = Mistral3Config(
    text_config=dict(
        model_type="mistral", vocab_size=131072, hidden_size=5120, intermediate_size=32768, num_hidden_layers=40,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    ),
    vision_config=dict(
        model_type="pixtral", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=1540, patch_size=14,
    ),
    tie_word_embeddings=False,
)  # fmt: skip
QWEN3_VL_8B = Qwen3VLConfig(
    text_config=dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
        rope_parameters={"mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_type": "default"},
    ),
    vision_config=dict(out_hidden_size=4096),
)  # fmt: skip
QWEN3_VL_4B = Qwen3VLConfig(
    text_config=dict(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
        rope_parameters={"mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_type": "default"},
    ),
    vision_config=dict(
        depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=2560,
        deepstack_visual_indexes=[5, 11, 17],
    ),
    tie_word_embeddings=True,
)  # fmt: skip

# --- autoencoders ------------------------------------------------------------------------------------------------
KL = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
)  # fmt: skip
KL_16 = {**KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
DC = dict(
    latent_channels=32, attention_head_dim=32, encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, scaling_factor=0.41407,
    encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024), encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
    decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024), decoder_layers_per_block=(3,) * 6,
    encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)), decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    downsample_block_type="Conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
    decoder_act_fns="silu",
)  # fmt: skip

# --- denoisers ---------------------------------------------------------------------------------------------------
SD15_UNET = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
SDXL_UNET = dict(
    sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
SD3 = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, joint_attention_dim=4096,
    pooled_projection_dim=2048, qk_norm="rms_norm",
)  # fmt: skip
SD35_MEDIUM = dict(
    **SD3, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)),
)  # fmt: skip
SD35_LARGE = dict(**SD3, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192)
FLUX = dict(guidance_embeds=True)
KLEIN_4B = dict(
    num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False,
)  # fmt: skip
KLEIN_9B = dict(
    num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288, guidance_embeds=False,
)  # fmt: skip
SANA = dict(sample_size=32)
PIXART = dict(
    sample_size=128, num_layers=28, num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
    cross_attention_dim=1152, caption_channels=4096, attention_bias=True, use_additional_conditions=False,
    norm_type="ada_norm_single", num_embeds_ada_norm=1000, interpolation_scale=2, patch_size=2,
)  # fmt: skip

CLIPS = {
    "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
    "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
}
T5 = ("T5EncoderModel", T5_XXL)
SD3_PARTS = {"vae": (AutoencoderKL, KL_16), **CLIPS, "text_encoder_3": T5}

# Hub id -> the stock pipeline, its networks, and how many billions of parameters the denoiser and all text encoders
# are known to have (3.5 medium's published 2.5 count 0.23 of position embeddings, which are no parameters here).
TEACHERS: dict[str, tuple[str, dict, float, float]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "StableDiffusionPipeline",
        {
            "unet": (UNet2DConditionModel, SD15_UNET), "vae": (AutoencoderKL, KL),
            "text_encoder": ("CLIPTextModel", CLIP_L),
        },
        0.860, 0.123,
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "StableDiffusionXLPipeline",
        {
            "unet": (UNet2DConditionModel, SDXL_UNET), "vae": (AutoencoderKL, KL), **CLIPS,
            "text_encoder": ("CLIPTextModel", CLIP_L),
        },
        2.567, 0.817,
    ),
    "stabilityai/stable-diffusion-3.5-medium": (
        "StableDiffusion3Pipeline", {"transformer": (SD3Transformer2DModel, SD35_MEDIUM), **SD3_PARTS}, 2.24, 5.58,
    ),
    "stabilityai/stable-diffusion-3.5-large": (
        "StableDiffusion3Pipeline", {"transformer": (SD3Transformer2DModel, SD35_LARGE), **SD3_PARTS}, 8.06, 5.58,
    ),
    "black-forest-labs/FLUX.1-dev": (
        "FluxPipeline",
        {
            "transformer": (FluxTransformer2DModel, FLUX), "vae": (AutoencoderKL, KL_16),
            "text_encoder": ("CLIPTextModel", CLIP_L), "text_encoder_2": T5,
        },
        11.9, 4.89,
    ),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": (
        "SanaPipeline",
        {
            "transformer": (SanaTransformer2DModel, SANA), "vae": (AutoencoderDC, DC),
            "text_encoder": ("Gemma2Model", GEMMA_2B),
        },
        1.60, 2.61,
    ),
    "Tongyi-MAI/Z-Image": (
        "ZImagePipeline",
        {
            "transformer": (ZImageTransformer2DModel, {}), "vae": (AutoencoderKL, KL_16),
            "text_encoder": ("Qwen3Model", QWEN3_4B),
        },
        6.15, 4.02,
    ),
    "Qwen/Qwen-Image": (
        "QwenImagePipeline",
        {
            "transformer": (QwenImageTransformer2DModel, {}), "vae": (AutoencoderKLQwenImage, {}),
            "text_encoder": ("Qwen2_5_VLForConditionalGeneration", QWEN_VL_7B),
        },
        20.4, 8.29,
    ),
    "black-forest-labs/FLUX.2-klein-base-4B": (
        "Flux2KleinPipeline",
        {
            "transformer": (Flux2Transformer2DModel, KLEIN_4B), "vae": (AutoencoderKLFlux2, {}),
            "text_encoder": ("Qwen3ForCausalLM", QWEN3_4B),
        },
        3.88, 4.02,
    ),
    "black-forest-labs/FLUX.2-klein-base-9B": (
        "Flux2KleinPipeline",
        {
            "transformer": (Flux2Transformer2DModel, KLEIN_9B), "vae": (AutoencoderKLFlux2, {}),
            "text_encoder": ("Qwen3ForCausalLM", QWEN3_8B),
        },
        9.08, 8.19,
    ),
    "lodestones/Chroma1-HD": (
        "ChromaPipeline",
        {"transformer": (ChromaTransformer2DModel, {}), "vae": (AutoencoderKL, KL_16), "text_encoder": T5},
        8.90, 4.76,
    ),
    "black-forest-labs/FLUX.2-dev": (
        "Flux2Pipeline",
        {
            "transformer": (Flux2Transformer2DModel, {}), "vae": (AutoencoderKLFlux2, {}),
            "text_encoder": ("Mistral3ForConditionalGeneration", MISTRAL_24B),
        },
        32.2, 24.0,
    ),
    "Qwen/Qwen-Image-2.1": (
        "QwenImage21Pipeline",
        {
            "transformer": (QwenImage21Transformer2DModel, {}), "vae": (AutoencoderKLQwenImage21, {}),
            "text_encoder": ("Qwen3VLForConditionalGeneration", QWEN3_VL_8B),
        },
        7.12, 8.77,
    ),
    "Alpha-VLLM/Lumina-Image-2.0": (
        "Lumina2Pipeline",
        {
            "transformer": (Lumina2Transformer2DModel, {"cap_feat_dim": 2304}), "vae": (AutoencoderKL, KL_16),
            "text_encoder": ("Gemma2Model", GEMMA_2B),
        },
        2.61, 2.61,
    ),
    "krea/Krea-2-Raw": (
        "Krea2Pipeline",
        {
            "transformer": (Krea2Transformer2DModel, {}), "vae": (AutoencoderKLQwenImage, {}),
            "text_encoder": ("Qwen3VLModel", QWEN3_VL_4B),
        },
        12.8, 4.44,
    ),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": (
        "PixArtSigmaPipeline",
        {"transformer": (PixArtTransformer2DModel, PIXART), "vae": (AutoencoderKL, KL), "text_encoder": T5},
        0.61, 4.76,
    ),
}  # fmt: skip


def write_configs(teacher: str, folder: Path) -> Path:
    """The folder of a teacher of `TEACHERS`, without any weights."""
    name, parts, *_ = TEACHERS[teacher]
    index: dict = {"_class_name": name, "_diffusers_version": "0.36.0"}
    for part, (kind, settings) in parts.items():
        if isinstance(kind, str):
            settings.save_pretrained(folder / part)
            index[part] = ["transformers", kind]
        else:
            (folder / part).mkdir(parents=True)
            (folder / part / "config.json").write_text(json.dumps({"_class_name": kind.__name__, **settings}))
            index[part] = ["diffusers", kind.__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
