"""What reads a LoRA's file beside diffusers: the key maps of ComfyUI and of kohya's tools, as patterns.

They are written down from what those tools do, independently of what writes the files: ComfyUI's `comfy/lora.py`
(`model_lora_keys_unet`) with `comfy/utils.py` (`unet_to_diffusers`, `mmdit_to_diffusers`, `flux_to_diffusers`,
`z_image_to_diffusers`) and `comfy/ldm/qwen_image/model.py`; kohya's sd-scripts `networks/lora.py` with
`library/sdxl_model_util.py` (`make_unet_conversion_map`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rdm_diffusers.families import FAMILIES

ATTENTION = r"proj_in|proj_out|transformer_blocks_\d+_(attn[12]_(to_q|to_k|to_v|to_out_0)|ff_net_0_proj|ff_net_2)"
RESNET = r"conv1|conv2|time_emb_proj|conv_shortcut"
# Where kohya's tools put a LoRA on a U-Net: inside Transformer2DModel, ResnetBlock2D, Downsample2D and Upsample2D.
UNET = (
    rf"lora_unet_((down|up)_blocks_\d_attentions_\d_({ATTENTION})|(down|up)_blocks_\d_resnets_\d_({RESNET})"
    rf"|mid_block_attentions_0_({ATTENTION})|mid_block_resnets_[01]_({RESNET})"
    r"|down_blocks_\d_downsamplers_0_conv|up_blocks_\d_upsamplers_0_conv)"
)
JOINT = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
READ = {
    "StableDiffusionPipeline": UNET,
    "StableDiffusionXLPipeline": UNET,
    "StableDiffusion3Pipeline": rf"transformer\.transformer_blocks\.\d+\.({JOINT}|attn2\.(to_[qkv]|to_out\.0)"
    r"|(ff|ff_context)\.net\.(0\.proj|2))",
    "FluxPipeline": rf"transformer\.(transformer_blocks\.\d+\.({JOINT}|(ff|ff_context)\.net\.(0\.proj|2))"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)|proj_out)",
    "ZImagePipeline": r"transformer\.(layers|context_refiner|noise_refiner)\.\d+\."
    r"(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])",
    "QwenImagePipeline": rf"transformer\.transformer_blocks\.\d+\.({JOINT}|(img|txt)_mlp\.net\.(0\.proj|2))",
}
MATRICES = {"kohya": {"lora_down.weight", "lora_up.weight", "alpha"}, "diffusers": {"lora_A.weight", "lora_B.weight"}}
# kohya's map of SDXL's blocks: two resnets and attentions on the way down, three up, three blocks each.
SDXL = (
    r"lora_unet_(down_blocks_[0-2]_(resnets|attentions)_[01]|up_blocks_[0-2]_(resnets|attentions)_[0-2]"
    r"|down_blocks_[0-2]_downsamplers_0_conv|up_blocks_[0-2]_upsamplers_0|mid_block_attentions_0"
    r"|mid_block_resnets_[01])(_|\.)"
)


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
