"""What reads a LoRA's file beside diffusers: the key maps of ComfyUI and of kohya's tools, as patterns.

They are written down from what those tools do, independently of what writes the files: ComfyUI's `comfy/lora.py`
(`model_lora_keys_unet`) with `comfy/utils.py` (`unet_to_diffusers`, `mmdit_to_diffusers`, `flux_to_diffusers`,
`z_image_to_diffusers`) and `comfy/ldm/qwen_image/model.py`; kohya's sd-scripts `networks/lora.py` with
`library/sdxl_original_unet.py`, whose modules have Stability's names, as they are in SDXL's original checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from rdm_diffusers.families import FAMILIES

ATTENTION = r"proj_in|proj_out|transformer_blocks_\d+_(attn[12]_(to_q|to_k|to_v|to_out_0)|ff_net_0_proj|ff_net_2)"
RESNET = r"conv1|conv2|time_emb_proj|conv_shortcut"
# Where kohya's tools put a LoRA on a U-Net: inside Transformer2DModel, ResnetBlock2D, Downsample2D and Upsample2D.
UNET = (
    rf"lora_unet_((down|up)_blocks_\d_attentions_\d_({ATTENTION})|(down|up)_blocks_\d_resnets_\d_({RESNET})"
    rf"|mid_block_attentions_0_({ATTENTION})|mid_block_resnets_[01]_({RESNET})"
    r"|down_blocks_\d_downsamplers_0_conv|up_blocks_\d_upsamplers_0_conv)"
)
# The same under Stability's names; which of them SDXL has, tests/test_stability_names.py says one by one.
LAYER = rf"0_(in_layers_2|emb_layers_1|out_layers_3|skip_connection)|1_({ATTENTION})"
SDXL = (
    rf"lora_unet_(input_blocks_\d_({LAYER}|0_op)|middle_block_(2_(in_layers_2|emb_layers_1|out_layers_3)|{LAYER})"
    rf"|output_blocks_\d_({LAYER}|2_conv))"
)
JOINT = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
READ = {
    "StableDiffusionPipeline": UNET,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": rf"transformer\.transformer_blocks\.\d+\.({JOINT}|attn2\.(to_[qkv]|to_out\.0)"
    r"|(ff|ff_context)\.net\.(0\.proj|2))",
    "FluxPipeline": rf"transformer\.(transformer_blocks\.\d+\.({JOINT}|(ff|ff_context)\.net\.(0\.proj|2))"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)|proj_out)",
    "ZImagePipeline": r"transformer\.(layers|context_refiner|noise_refiner)\.\d+\."
    r"(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])",
    "QwenImagePipeline": rf"transformer\.transformer_blocks\.\d+\.({JOINT}|(img|txt)_mlp\.net\.(0\.proj|2))",
}
KOHYA = {"lora_down.weight", "lora_up.weight", "alpha"}
MATRICES = {"kohya": KOHYA, "stability": KOHYA, "diffusers": {"lora_A.weight", "lora_B.weight"}}


def stability_parts(unet: nn.Module) -> dict[str, str]:
    """diffusers' path of each part of a U-Net by Stability's, from a walk through the network in the order it runs."""
    inputs, outputs = [["conv_in"]], []
    for place, block in unet.down_blocks.named_children():
        inputs += _layers(f"down_blocks.{place}", block)
        inputs += [[f"down_blocks.{place}.downsamplers.0"] for _ in block.downsamplers or ()]
    for place, block in unet.up_blocks.named_children():
        outputs += _layers(f"up_blocks.{place}", block)
        outputs[-1] += [f"up_blocks.{place}.upsamplers.0" for _ in block.upsamplers or ()]
    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    parts = {f"middle_block.{i}": path for i, path in enumerate(middle)}
    for name, rows in {"input_blocks": inputs, "output_blocks": outputs}.items():
        parts |= {f"{name}.{i}.{j}": path for i, row in enumerate(rows) for j, path in enumerate(row)}
    heads = {"out.2": "conv_out"}
    for mlp, own in {"time_embed": "time_embedding", "label_emb.0": "add_embedding"}.items():
        heads |= {f"{mlp}.{2 * i}": f"{own}.linear_{i + 1}" for i in range(2)}
    return parts | heads


def _layers(path: str, block: nn.Module) -> list[list[str]]:
    """A block's layers, each a residual block and, where there is one, the attention after it."""
    kinds = [kind for kind in ("resnets", "attentions") if hasattr(block, kind)]
    return [[f"{path}.{kind}.{i}" for kind in kinds] for i in range(len(block.resnets))]


def stability_modules(unet: nn.Module) -> dict[str, str]:
    """diffusers' path of each convolution and linear layer of a U-Net, by what a LoRA's file calls it."""
    residual = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    residual["conv_shortcut"] = "skip_connection"
    modules, found = dict(unet.named_modules()), {}
    for part, path in stability_parts(unet).items():
        names = residual | {"conv": "op" if part.startswith("input") else "conv"}
        for name, layer in modules[path].named_modules() if path in modules else ():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                whole = ".".join(filter(None, (part, names.get(name, name))))
                found[f"lora_unet_{whole.replace('.', '_')}"] = ".".join(filter(None, (path, name)))
    return found


def modules_of(keys: Iterable[str]) -> dict[str, set[str]]:
    """The file's modules, each with the names of its tensors."""
    modules: dict[str, set[str]] = {}
    for key in keys:
        found = re.fullmatch(r"(.+)\.(lora_\w+\.weight|alpha)", key)
        assert found, key
        modules.setdefault(found[1], set()).add(found[2])
    return modules


def assert_read(keys: Iterable[str], name: str) -> None:
    """Every module of a student of the stock pipeline `name` is known to its readers, and has all that they want."""
    modules = modules_of(keys)
    assert modules
    for module, matrices in modules.items():
        assert re.fullmatch(READ[name], module), module
        assert matrices == MATRICES[FAMILIES[name].comfyui_keys]
