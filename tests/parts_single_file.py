"""Pipelines as checkpoints of a single file, under the names that their makers gave to the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from rdm_diffusers.hub.comfyui import stability_names

DENOISER = "model.diffusion_model."
CLIP_SD, CLIP_SDXL = "cond_stage_model.transformer.", "conditioner.embedders.0.transformer."
OPEN_CLIP_SDXL = "conditioner.embedders.1.model."
NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0", "conv_norm_out": "out.0"}
# Of OpenCLIP, by transformers' names.
OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def original_unet(unet: nn.Module) -> dict[str, Tensor]:
    """CompVis' and Stability's names of a U-Net's weights."""
    weights = unet.state_dict()
    modules = {name.rpartition(".")[0] for name in weights}
    norms = {path for path in modules if path.rpartition(".")[2] in NORMS and "transformer_blocks" not in path}
    paths = stability_names(modules - norms, unet.config)
    for path in norms:  # no LoRA adapts these
        owner, _, norm = path.rpartition(".")
        block = next(iter(stability_names([f"{owner}.conv1"], unet.config).values())) if owner else ""
        paths[path] = f"{block.removesuffix('in_layers.2')}{NORMS[norm]}"
    split = {name: name.rpartition(".") for name in weights}
    return {f"{DENOISER}{paths[split[name][0]]}.{split[name][2]}": each for name, each in weights.items()}


def original_vae(vae: nn.Module) -> dict[str, Tensor]:
    """CompVis' names of an autoencoder's weights; one without attention."""
    blocks = len(vae.config.up_block_types)
    found = {}
    for name, tensor in vae.state_dict().items():
        for i in range(blocks):
            name = name.replace(f"down_blocks.{i}.resnets", f"down.{i}.block")
            name = name.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
            name = name.replace(f"up_blocks.{i}.resnets", f"up.{blocks - 1 - i}.block")
            name = name.replace(f"up_blocks.{i}.upsamplers.0", f"up.{blocks - 1 - i}.upsample")
        for i in (0, 1):
            name = name.replace(f"mid_block.resnets.{i}", f"mid.block_{i + 1}")
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        found[f"first_stage_model.{name}"] = tensor
    return found


def original_clip(encoder: nn.Module, prefix: str = CLIP_SD) -> dict[str, Tensor]:
    """OpenAI's names of a text encoder's weights, which transformers has, too."""
    return {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": each for name, each in encoder.state_dict().items()
    }


def original_open_clip(encoder: nn.Module) -> dict[str, Tensor]:
    """OpenCLIP's names of a text encoder's weights, with queries, keys and values in one matrix."""
    weights, found = dict(encoder.state_dict()), {}
    for name in [name for name in weights if "q_proj" in name]:
        joined = torch.cat([weights.pop(name.replace("q_proj", each)) for each in ("q_proj", "k_proj", "v_proj")])
        found[name.replace("self_attn.q_proj.", "attn.in_proj_")] = joined
    for name, tensor in {**weights, **found}.items():
        found.pop(name, None)
        transposed = tensor.T.contiguous() if name == "text_projection.weight" else tensor
        for theirs, ours in OPEN_CLIP.items():
            name = name.replace(theirs, ours)
        found[OPEN_CLIP_SDXL + name] = transposed
    return found


def original_z_image(transformer: nn.Module) -> dict[str, Tensor]:
    """Z-Image's own names, with queries, keys and values in one matrix."""
    weights = dict(transformer.state_dict())
    for name in [name for name in weights if ".to_q." in name]:
        joined = torch.cat([weights.pop(name.replace("to_q", each)) for each in ("to_q", "to_k", "to_v")])
        weights[name.replace("to_q", "qkv")] = joined
    renamed = {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.", "to_out.0": "out",
               "norm_q": "q_norm", "norm_k": "k_norm"}  # fmt: skip
    found = {}
    for name, tensor in weights.items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        found[DENOISER + name] = tensor
    return found


def original(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """All weights of a Stable Diffusion or Stable Diffusion XL pipeline, under their makers' names."""
    is_xl = getattr(pipeline, "text_encoder_2", None) is not None
    own = original_unet(pipeline.unet) | original_vae(pipeline.vae)
    own |= original_clip(pipeline.text_encoder, CLIP_SDXL if is_xl else CLIP_SD)
    return own | (original_open_clip(pipeline.text_encoder_2) if is_xl else {})


def write_file(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file."""
    save_file({name: each.contiguous().clone() for name, each in weights.items()}, path, metadata)
    return path
