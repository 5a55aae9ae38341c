"""Stability's names for a U-Net's modules, as in SDXL's original checkpoint, which every program for SDXL reads.

diffusers counts blocks, and layers inside them. Stability counts in the order of execution: `input_blocks` are the
first convolution, each layer on the way down, and each downsampling; `output_blocks` are the layers on the way up. In
each of these the residual block is 0 and the attention 1; an upsampling is 2 in the output block that it ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
IN_RESIDUAL_BLOCKS = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
DOWN, UP = {"DownBlock2D", "CrossAttnDownBlock2D"}, {"UpBlock2D", "CrossAttnUpBlock2D"}
MIDDLE = {"UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None}
MAX_BLOCKS = 10  # diffusers' own loader confuses `input_blocks_10` with a part of `input_blocks_1`


def stability_names(paths: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Stability's path of each module: `input_blocks.4.1.proj_in` for `down_blocks.1.attentions.0.proj_in`.

    Args:
        paths: of the modules in diffusers' network.
        config: the network's configuration.

    Raises:
        ValueError: if a module has no such name, or not one that diffusers reads; its text gives the reason and
            completes a sentence.
    """
    _check_layout(config)
    parts = {**OUTSIDE_BLOCKS, **_block_names(config["layers_per_block"], len(config["down_block_types"]))}
    return {path: _name(path, parts) for path in paths}


def _check_layout(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a layout other than SDXL's."""
    layers, down, up = (config.get(name) for name in ("layers_per_block", "down_block_types", "up_block_types"))
    if not (isinstance(down, list | tuple) and isinstance(up, list | tuple)):
        raise ValueError("its configuration names no blocks")
    if not isinstance(layers, int):
        raise ValueError(f"its layers_per_block are {layers}, not one number")
    kinds = [*sorted(set(down) - DOWN), *sorted(set(up) - UP)]
    if kinds or config.get("mid_block_type", "UNetMidBlock2DCrossAttn") not in MIDDLE:
        raise ValueError(f"it has blocks of another kind, {', '.join(kinds) or config['mid_block_type']}")
    if "UpBlock2D" in up[:-1]:
        raise ValueError("it has an upsampling after a block without attention")
    if len(down) * (layers + 1) > MAX_BLOCKS:
        raise ValueError(f"it has {len(down)} blocks of {layers} layers, more than such names can distinguish")


def _block_names(layers: int, blocks: int) -> dict[str, str]:
    """Stability's paths of all residual blocks, attentions and samplings on the way down and up."""
    names = {}
    for block in range(blocks):
        first = block * (layers + 1)
        for kind, index in {"resnets": 0, "attentions": 1}.items():
            for layer in range(layers):
                names[f"down_blocks.{block}.{kind}.{layer}"] = f"input_blocks.{first + layer + 1}.{index}"
            for layer in range(layers + 1):
                names[f"up_blocks.{block}.{kind}.{layer}"] = f"output_blocks.{first + layer}.{index}"
        names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{first + layers + 1}.0.op"
        names[f"up_blocks.{block}.upsamplers.0"] = f"output_blocks.{first + layers}.2"
    return names


def _name(path: str, parts: Mapping[str, str]) -> str:
    """A module's path, with the name that `parts` gives its beginning."""
    part = next((part for part in parts if f"{path}.".startswith(f"{part}.")), None)
    if part is None:
        raise ValueError(f"its {path} has no such name")
    inside = path.removeprefix(part).removeprefix(".")
    return f"{parts[part]}.{IN_RESIDUAL_BLOCKS.get(inside, inside)}".removesuffix(".")
