"""Pipelines as checkpoints of a single file, under the names that their makers gave to the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from rdm_diffusers.hub import comfyui
from rdm_diffusers.hub.comfyui import stability_names

# Of Stable Diffusion 3, by diffusers' names; the order matters.
SD3 = {
    "transformer_blocks.": "joint_blocks.", "pos_embed.proj.": "x_embedder.proj.",
    "pos_embed.pos_embed": "pos_embed", "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "attn.context_qkv": "context_block.attn.qkv", "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    ".attn.qkv": ".x_block.attn.qkv", ".attn.to_out.0": ".x_block.attn.proj", ".attn.norm_q": ".x_block.attn.ln_q",
    ".attn.norm_k": ".x_block.attn.ln_k", ".attn2.qkv": ".x_block.attn2.qkv",
    ".attn2.to_out.0": ".x_block.attn2.proj", ".attn2.norm_q": ".x_block.attn2.ln_q",
    ".attn2.norm_k": ".x_block.attn2.ln_k", "context_block.x_block": "context_block",
    "norm1_context.linear": "context_block.adaLN_modulation.1", "norm1.linear": "x_block.adaLN_modulation.1",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}  # fmt: skip
# Of FLUX: matrices that are one there, and the other names.
FLUX_JOINED = {
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"): "linear1",
    ("attn.to_q", "attn.to_k", "attn.to_v"): "img_attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "txt_attn.qkv",
}
FLUX = {
    "single_transformer_blocks.": "single_blocks.", "transformer_blocks.": "double_blocks.",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in", "x_embedder": "img_in", "norm1_context.linear": "txt_mod.lin",
    "norm1.linear": "img_mod.lin", "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale", "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj", "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
    "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2", "norm_out.linear": "final_layer.adaLN_modulation.1",
}  # fmt: skip
DENOISER = "model.diffusion_model."
CLIP_SD, CLIP_SDXL = "cond_stage_model.transformer.", "conditioner.embedders.0.transformer."
OPEN_CLIP_SDXL = "conditioner.embedders.1.model."
VAE_ATTENTION = {
    "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
    "to_out.0": "proj_out",
}  # fmt: skip
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
    weights, config = unet.state_dict(), unet.config
    blocks = len(config.down_block_types)
    layout = {"layers_per_block": config.layers_per_block, "down_block_types": ["DownBlock2D"] * blocks,
              "up_block_types": ["CrossAttnUpBlock2D"] * blocks}  # fmt: skip
    modules = {name.rpartition(".")[0] for name in weights}
    norms = {path for path in modules if path.rpartition(".")[2] in NORMS and "transformer_blocks" not in path}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfyui, "MAX_BLOCKS", 100)  # which is a limit for LoRAs alone
        paths = _paths(modules, norms, layout)
    for path in modules:  # an upsampling stands in the place of the attention, where there is none
        part, block, kind, *_ = [*path.split("."), "", "", ""]
        if part == "up_blocks" and kind == "upsamplers" and config.up_block_types[int(block)] == "UpBlock2D":
            paths[path] = paths[path].replace(".2.conv", ".1.conv")
    split = {name: name.rpartition(".") for name in weights}
    return {f"{DENOISER}{paths[split[name][0]]}.{split[name][2]}": each for name, each in weights.items()}


def _paths(modules: set[str], norms: set[str], layout: dict) -> dict[str, str]:
    """Stability's path of each module of a U-Net."""
    paths = stability_names(modules - norms, layout)
    for path in norms:  # no LoRA adapts these
        owner, _, norm = path.rpartition(".")
        block = next(iter(stability_names([f"{owner}.conv1"], layout).values())) if owner else ""
        paths[path] = f"{block.removesuffix('in_layers.2')}{NORMS[norm]}"
    return paths


def original_vae(vae: nn.Module) -> dict[str, Tensor]:
    """CompVis' names of an autoencoder's weights; the matrices of its attentions are 1x1 convolutions there."""
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
        if "attentions.0" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        for theirs, ours in VAE_ATTENTION.items():
            name = name.replace(theirs, ours)
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


def original_sd3(transformer: nn.Module) -> dict[str, Tensor]:
    """Stability's names of the weights of a transformer of Stable Diffusion 3 or 3.5."""
    weights = dict(transformer.state_dict())
    last = f"transformer_blocks.{transformer.config.num_layers - 1}.norm1_context.linear"
    for name in [name for name in weights if name.startswith((last, "norm_out.linear"))]:
        scale, shift = weights[name].chunk(2)
        weights[name] = torch.cat([shift, scale])
    for sources in (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")):
        for name in [name for name in weights if f".{sources[0]}." in name]:
            joined = torch.cat([weights.pop(name.replace(sources[0], each)) for each in sources])
            weights[name.replace(sources[0], "qkv" if sources[0] == "to_q" else "context_qkv")] = joined
    found = {}
    for name, tensor in weights.items():
        for theirs, ours in SD3.items():
            name = name.replace(theirs, ours)
        found[DENOISER + name] = tensor
    return found


def original_flux(transformer: nn.Module) -> dict[str, Tensor]:
    """FLUX's own names of its weights; the halves of the last modulation are not swapped."""
    weights = dict(transformer.state_dict())
    for sources, joined in FLUX_JOINED.items():
        for name in [name for name in weights if f".{sources[0]}." in name]:
            parts = [name.replace(sources[0], each) for each in sources]
            if all(part in weights for part in parts):
                weights[name.replace(sources[0], joined)] = torch.cat([weights.pop(part) for part in parts])
    found = {}
    for name, tensor in weights.items():
        if name.startswith("single_"):
            name = name.replace("norm.linear", "modulation.lin").replace("proj_out", "linear2")
            name = name.replace("attn.norm_q.weight", "norm.query_norm.scale")
            name = name.replace("attn.norm_k.weight", "norm.key_norm.scale")
        name = name.replace("attn.norm_q.weight", "img_attn.norm.query_norm.scale")
        name = name.replace("attn.norm_k.weight", "img_attn.norm.key_norm.scale")
        name = name.replace("proj_out", "final_layer.linear")
        for theirs, ours in FLUX.items():
            name = name.replace(theirs, ours)
        found[name] = tensor
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
