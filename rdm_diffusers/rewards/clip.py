"""CLIP models: transformers' `CLIPModel` from a folder, the Hub, or a file in open_clip's naming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from .weights import file_in, load_model, local_path, model_from_tensors, read_tensors

# open_clip's names of what a transformer's layer holds -> transformers'; what stands in `attn.in_proj` is in thirds.
LAYER_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TOWER_NAMES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}


def load_clip(
    reward: str, place: str | Path, dtype: torch.dtype, files: Sequence[str] = (), config: CLIPConfig | None = None
) -> tuple[CLIPModel, Path | None]:
    """A CLIP model, and where it was found on this machine (None for the Hub).

    `place` is a folder that transformers saved, a Hub id, a file of weights, or a folder that holds one of these
    `files`. The configuration of a file is the `config.json` beside it, else `config`.
    """
    path = local_path(reward, str(place))
    if path is None or (path.is_dir() and (config is None or not any((path / name).is_file() for name in files))):
        return load_model(reward, CLIPModel, path or str(place), dtype), path
    file = file_in(reward, path, files)
    tensors = read_tensors(reward, file)
    if "visual.conv1.weight" in tensors:
        tensors = convert_open_clip(tensors)
    beside = file.parent / "config.json"
    found = CLIPConfig.from_pretrained(beside) if beside.is_file() else config
    if found is None:
        raise ValueError(
            f"The file {file} of the reward {reward} has no config.json beside it; put it there, or name a folder that "
            "transformers saved."
        )
    return model_from_tensors(reward, CLIPModel, found, tensors, file, dtype), path


def vit_h_config() -> CLIPConfig:
    """The configuration of open_clip's ViT-H-14, as in its `model_configs/ViT-H-14.json`."""
    common = {"hidden_act": "gelu", "num_attention_heads": 16, "projection_dim": 1024}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, **common}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14, **common}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)


def convert_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in open_clip's naming -> those of transformers' `CLIPModel`.

    Queries, keys and values are split, projections transposed; unknown names stay, for an error to name them.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "resblocks." in name:
            converted |= _convert_layer(name, tensor)
        elif name in PROJECTIONS:
            converted[PROJECTIONS[name]] = tensor.T.contiguous()
        elif not name.endswith("attn_mask"):  # a constant that old versions saved
            converted[TOWER_NAMES.get(name, name)] = tensor
    return converted


def _convert_layer(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of a layer, `[visual.]transformer.resblocks.N.part.weight`."""
    tower = "vision_model" if name.startswith("visual.") else "text_model"
    number, part = name.split("resblocks.")[1].split(".", 1)
    layer = f"{tower}.encoder.layers.{number}"
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        thirds = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{layer}.self_attn.{which}_proj.{kind}": third.clone() for which, third in thirds}
    module, kind = part.rsplit(".", 1)
    return {f"{layer}.{LAYER_NAMES.get(module, module)}.{kind}": tensor}
