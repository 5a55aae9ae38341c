"""Tiny real pipelines of every family, untrained, made offline."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from parts import make_pipeline as make_sd
from parts_sd3 import make_sd3_pipeline, t5, t5_tokenizer, text_config
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)

from rdm_diffusers.families.flow import pack, unpack
from rdm_diffusers.tiny.captions import make_tokenizer

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_OF_PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def make_vae(**changes) -> AutoencoderKL:
    """An autoencoder with latents of 4 channels, a fourth as wide and as high."""
    settings = dict(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        sample_size=32, mid_block_add_attention=False, scaling_factor=1.5,
    )  # fmt: skip
    return AutoencoderKL(**{**settings, **changes}).eval()


def make_sdxl(prediction_type: str = "epsilon", **scheduler) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL with its two text encoders and its six numbers of size and crop."""
    tokenizer = make_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4, norm_num_groups=4, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 8, transformer_layers_per_block=(1, 1),
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        unet=unet.eval(), vae=make_vae(), scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
            steps_offset=1, **scheduler,
        ),
        text_encoder=CLIPTextModel(text_config(tokenizer, 16)).eval(), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 8)).eval(), tokenizer_2=tokenizer,
    )  # fmt: skip


def make_flux(guidance_embeds: bool = True) -> FluxPipeline:
    """FLUX.1, dev or (without `guidance_embeds`) schnell."""
    tokenizer = make_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    pipeline = FluxPipeline(
        transformer=transformer.eval(), vae=make_vae(shift_factor=0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds, shift=3.0),
        text_encoder=CLIPTextModel(text_config(tokenizer, 16)).eval(), tokenizer=tokenizer, text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )  # fmt: skip
    return pipeline


def make_pixart() -> PixArtSigmaPipeline:
    """PixArt-Sigma, whose transformer also puts out a variance."""
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, caption_channels=32, cross_attention_dim=16, norm_type="ada_norm_single", attention_bias=True,
        use_additional_conditions=False, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return PixArtSigmaPipeline(
        transformer=transformer.eval(), vae=make_vae(), text_encoder=t5(), tokenizer=t5_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    )  # fmt: skip


def make_sana() -> SanaPipeline:
    """SANA with its own kind of autoencoder."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=8,
    )  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.4,
    )  # fmt: skip
    return SanaPipeline(
        transformer=transformer.eval(), vae=vae.eval(), text_encoder=gemma(), tokenizer=gemma_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++",
        ),
    )  # fmt: skip


def gemma(layers: int = 1) -> Gemma2Model:
    """A text encoder, 8 wide."""
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    return Gemma2Model(config).eval()


def gemma_tokenizer() -> GemmaTokenizer:
    """A tokenizer of small letters."""
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return GemmaTokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])


def make_lumina_2() -> Lumina2Pipeline:
    """Lumina 2, which has fewer keys and values than queries."""
    transformer = Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 8), cap_feat_dim=8,
    )  # fmt: skip
    vae = make_vae(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, shift_factor=0.1,
    )  # fmt: skip
    return Lumina2Pipeline(
        transformer=transformer.eval(), vae=vae, text_encoder=gemma(2), tokenizer=gemma_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )  # fmt: skip


def make_z_image() -> ZImagePipeline:
    """Z-Image; its padding tokens are set, as they come uninitialised."""
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 4, 8], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.zeros_(token)
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=256,
        )
    )
    return ZImagePipeline(
        transformer=transformer.eval(), vae=make_vae(shift_factor=0.1), text_encoder=encoder.eval(),
        tokenizer=qwen_tokenizer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def make_qwen_image() -> QwenImagePipeline:
    """Qwen-Image with its video autoencoder and its vision-language text encoder."""
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=300,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default"},
            ),
            vision_config=dict(
                depth=1,
                hidden_size=16,
                intermediate_size=16,
                num_heads=2,
                out_hidden_size=16,
                fullatt_block_indexes=[0],
            ),
        )
    )
    return QwenImagePipeline(
        transformer=transformer.eval(), vae=qwen_vae(), text_encoder=encoder.eval(), tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip


def flux_2_parts(guidance_embeds: bool) -> dict:
    """The networks of FLUX.2 that its pipelines share; the statistics of its autoencoder are none of a fresh norm."""
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        sample_size=32, mid_block_add_attention=False,
    )  # fmt: skip
    vae.bn.running_mean = torch.linspace(-0.2, 0.2, 16)
    vae.bn.running_var = torch.linspace(0.5, 2.0, 16)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return {"transformer": transformer.eval(), "vae": vae.eval(), "scheduler": scheduler}


def make_flux_2_klein() -> Flux2KleinPipeline:
    """FLUX.2 klein; its transformer reads three layers of its text encoder, the last of them the 27th."""
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=27,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=256,
        )
    )
    parts = flux_2_parts(guidance_embeds=False)
    return Flux2KleinPipeline(text_encoder=encoder.eval(), tokenizer=qwen_tokenizer(), **parts)


def make_flux_2() -> Flux2Pipeline:
    """FLUX.2 dev, with a tokenizer alone in place of a processor of text and images."""
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=dict(
                model_type="mistral",
                vocab_size=300,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=30,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=512,
            ),
            vision_config=dict(
                model_type="pixtral",
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
            ),
        )
    )
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT_OF_PARTS
    return Flux2Pipeline(text_encoder=encoder.eval(), tokenizer=tokenizer, **flux_2_parts(guidance_embeds=True))


def make_chroma() -> ChromaPipeline:
    """Chroma, whose modulations come from one small network."""
    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return ChromaPipeline(
        transformer=transformer.eval(), vae=make_vae(shift_factor=0.1), text_encoder=t5(), tokenizer=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip


def qwen_vae() -> AutoencoderKLQwenImage:
    """Qwen-Image's autoencoder of films, with latents of 4 channels, a fourth as wide and as high."""
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, 0.0, -0.1, 0.2], latents_std=[1.5, 1.0, 0.8, 1.2],
    ).eval()  # fmt: skip


def make_qwen_image_21() -> QwenImage21Pipeline:
    """Qwen-Image 2.1, whose autoencoder has an alpha channel and makes one latent of 16 x 16 pixels.

    transformers' processor of Qwen3-VL needs torchvision. Another of its processors does the same with text.
    """
    transformer = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=16,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, 0.0, -0.1, 0.2], latents_std=[1.5, 1.0, 0.8, 1.2],
    )  # fmt: skip
    encoder = Qwen3VLForConditionalGeneration(qwen3_vl_config())
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|image_pad|>"]})
    processor = LlavaProcessor(
        CLIPImageProcessorPil(), tokenizer, image_token="<|image_pad|>",
        chat_template=CHAT.replace("message['content']", "message['content'][0]['text']"),
    )  # fmt: skip
    return QwenImage21Pipeline(
        transformer=transformer.eval(), vae=vae.eval(), text_encoder=encoder.eval(),
        processor=processor,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
    )  # fmt: skip


def make_krea_2() -> Krea2Pipeline:
    """Krea 2, which reads several layers of its text encoder; its chat template ends in five tokens, as by default."""
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["assistant"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return Krea2Pipeline(
        transformer=transformer.eval(), vae=qwen_vae(), text_encoder=Qwen3VLModel(qwen3_vl_config()).eval(),
        tokenizer=tokenizer, text_encoder_select_layers=(2, 1, 0),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
    )  # fmt: skip


def qwen3_vl_config() -> Qwen3VLConfig:
    """A Qwen3-VL of two layers, 16 wide."""
    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            rope_parameters={"mrope_section": [1, 1, 2], "mrope_interleaved": True, "rope_type": "default"},
        ),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, deepstack_visual_indexes=[0]
        ),
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of single bytes, with Qwen's chat template."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {letter: i for i, letter in enumerate(bytes_to_unicode().values())}
    special = {name: len(vocab) + i for i, name in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])}
    tokenizer = Qwen2Tokenizer(vocab={**vocab, **special}, merges=[])
    tokenizer.chat_template = CHAT
    return tokenizer


def make_sd_v() -> StableDiffusionPipeline:
    """Stable Diffusion 2 with v-prediction and zero terminal SNR."""
    pipeline = make_sd()
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    return pipeline


MAKERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "StableDiffusionPipeline": make_sd_v,
    "StableDiffusionXLPipeline": make_sdxl,
    "StableDiffusion3Pipeline": make_sd3_pipeline,
    "FluxPipeline": make_flux,
    "PixArtSigmaPipeline": make_pixart,
    "SanaPipeline": make_sana,
    "ZImagePipeline": make_z_image,
    "QwenImagePipeline": make_qwen_image,
    "Flux2KleinPipeline": make_flux_2_klein,
    "ChromaPipeline": make_chroma,
    "Flux2Pipeline": make_flux_2,
    "QwenImage21Pipeline": make_qwen_image_21,
    "Lumina2Pipeline": make_lumina_2,
    "Krea2Pipeline": make_krea_2,
}
PACKED = ("FluxPipeline", "QwenImagePipeline", "ChromaPipeline", "Krea2Pipeline")
# What the stock pipelines are called with for pictures so small and prompts so short.
CALLS: dict[str, dict] = {
    "StableDiffusion3Pipeline": {"max_sequence_length": 3},
    "FluxPipeline": {"height": 32, "width": 32, "max_sequence_length": 8},
    "PixArtSigmaPipeline": {"height": 32, "width": 32, "use_resolution_binning": False, "max_sequence_length": 8},
    "SanaPipeline": {"height": 32, "width": 32, "use_resolution_binning": False, "max_sequence_length": 16},
    "ZImagePipeline": {"height": 32, "width": 32, "max_sequence_length": 96},
    "QwenImagePipeline": {"height": 32, "width": 32, "max_sequence_length": 24},
    "Flux2KleinPipeline": {"height": 32, "width": 32, "max_sequence_length": 64},
    "ChromaPipeline": {"height": 32, "width": 32, "max_sequence_length": 48},
    "Flux2Pipeline": {"height": 32, "width": 32, "max_sequence_length": 256},
    "QwenImage21Pipeline": {"height": 32, "width": 32},
    "Lumina2Pipeline": {"height": 32, "width": 32, "max_sequence_length": 224},
    "Krea2Pipeline": {"height": 32, "width": 32, "max_sequence_length": 208},
}


def make_pipeline(name: str, seed: int = 0) -> DiffusionPipeline:
    """The tiny pipeline of a stock class's name, always with the same weights."""
    torch.manual_seed(seed)
    pipeline = MAKERS[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_latents(name: str, latents: Tensor) -> Tensor:
    """As the stock pipeline takes them."""
    if name.startswith("Flux2"):
        return Flux2KleinPipeline._patchify_latents(latents)
    if name == "QwenImage21Pipeline":
        return latents.flatten(2).transpose(1, 2)
    return pack(latents) if name in PACKED else latents


def own_latents(pipeline: DiffusionPipeline, raw: Tensor, like: Tensor) -> Tensor:
    """From those that the stock pipeline gives, in our shape."""
    name = type(pipeline).__name__
    if isinstance(pipeline, Flux2KleinPipeline):
        norm = copy.deepcopy(pipeline.vae.bn).eval()
        return Flux2KleinPipeline._unpatchify_latents(norm(Flux2KleinPipeline._patchify_latents(raw)))
    if name == "QwenImage21Pipeline":
        return raw.transpose(1, 2).reshape(like.shape)
    return unpack(raw, like) if name in (*PACKED, "Flux2Pipeline") else raw
