"""What reads a LoRA's file beside diffusers: the key maps of ComfyUI and of kohya's tools, as patterns.

They are written down from what those tools do, independently of what writes the files: ComfyUI's `comfy/lora.py`
(`model_lora_keys_unet`; for Qwen-Image 2.1, Krea 2 and Lumina 2 as of September 2026, ec93dcac) with `comfy/utils.py`
(`unet_to_diffusers`, `mmdit_to_diffusers`, `flux_to_diffusers`, `z_image_to_diffusers`, `krea2_to_diffusers`) and
`comfy/ldm/qwen_image/model.py`; kohya's sd-scripts `networks/lora.py` with `library/sdxl_original_unet.py`, whose
modules have Stability's names, as they are in SDXL's original checkpoint. The AUTOMATIC1111 web UI's
`convert_diffusers_name_to_compvis` knows the same names of Stable Diffusion 1 and 2.
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
    "Flux2KleinPipeline": rf"transformer\.(transformer_blocks\.\d+\.({JOINT}|(ff|ff_context)\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out))",
    "QwenImage21Pipeline": r"transformer\.transformer_blocks\.\d+\."
    r"(attn\.(to_[qkv]|to_out\.0)|img_mlp\.(proj|gate_layer|out))",
    "Krea2Pipeline": r"transformer\.(transformer_blocks|text_fusion\.(layerwise|refiner)_blocks)\.\d+\."
    r"(attn\.(to_[qkv]|to_gate|to_out\.0)|ff\.(gate|up|down))",
    "Lumina2Pipeline": r"diffusion_model\.(layers|context_refiner|noise_refiner)\.\d+\."
    r"(attention\.(qkv|out)|feed_forward\.w[123])",
}
READ |= {"ChromaPipeline": READ["FluxPipeline"], "Flux2Pipeline": READ["Flux2KleinPipeline"]}
KOHYA = {"lora_down.weight", "lora_up.weight", "alpha"}
PEFT = {"lora_A.weight", "lora_B.weight"}
MATRICES = {"kohya": KOHYA, "stability": KOHYA, "diffusers": PEFT, "joint": PEFT}
# ComfyUI's own names in Lumina 2's blocks, whose joint matrices hold the rows of several of diffusers'.
LUMINA = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "attention.out": ("attn.to_out.0",),
    "feed_forward.w1": ("feed_forward.linear_1",), "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
}  # fmt: skip


def paths_of(module: str) -> list[str]:
    """diffusers' paths of the matrices that a module of a file adds to, in the order of their rows; kohya's stay."""
    kind, _, path = module.partition(".")
    if kind != "diffusion_model":
        return [path or kind]
    block, own = re.fullmatch(r"(\w+\.\d+)\.(.+)", path).groups()
    return [f"{block}.{name}" for name in LUMINA[own]]


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


class Original:
    """The shapes of the weights of SDXL's original U-Net by module, in the order that Stability's code builds it.

    `model_channels` 320, `channel_mult` 1, 2, 4, two residual blocks a level, transformers of depth 0, 2, 10.
    """

    width, context = 320, 2048

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        channels = self._down()
        self._residual("middle_block_0", 1280, 1280)
        self._attention("middle_block_1", 1280, 10)
        self._residual("middle_block_2", 1280, 1280)
        self._up(channels)

    def _down(self) -> list[int]:
        channels, index = [self.width], 0
        for level, (mult, depth) in enumerate(((1, 0), (2, 2), (4, 10))):
            for _ in range(2):
                index += 1
                self._residual(f"input_blocks_{index}_0", channels[-1], mult * self.width)
                self._attention(f"input_blocks_{index}_1", mult * self.width, depth)
                channels.append(mult * self.width)
            if level < 2:
                index += 1
                self.shapes[f"input_blocks_{index}_0_op"] = (channels[-1], channels[-1], 3, 3)
                channels.append(channels[-1])
        return channels

    def _up(self, channels: list[int]) -> None:
        width, index = channels[-1], 0
        for level, (mult, depth) in enumerate(((4, 10), (2, 2), (1, 0))):
            for _ in range(3):
                self._residual(f"output_blocks_{index}_0", width + channels.pop(), mult * self.width)
                width = mult * self.width
                self._attention(f"output_blocks_{index}_1", width, depth)
                index += 1
            if level < 2:
                self.shapes[f"output_blocks_{index - 1}_2_conv"] = (width, width, 3, 3)

    def _residual(self, name: str, before: int, after: int) -> None:
        self.shapes[f"{name}_in_layers_2"] = (after, before, 3, 3)
        self.shapes[f"{name}_emb_layers_1"] = (after, 4 * self.width)
        self.shapes[f"{name}_out_layers_3"] = (after, after, 3, 3)
        if before != after:
            self.shapes[f"{name}_skip_connection"] = (after, before, 1, 1)

    def _attention(self, name: str, width: int, depth: int) -> None:
        if depth:
            self.shapes |= {f"{name}_proj_in": (width, width), f"{name}_proj_out": (width, width)}
        for layer in range(depth):
            block = f"{name}_transformer_blocks_{layer}"
            self.shapes |= {f"{block}_ff_net_0_proj": (8 * width, width), f"{block}_ff_net_2": (width, 4 * width)}
            for attention, read in (("attn1", width), ("attn2", self.context)):
                inputs = {"to_q": width, "to_k": read, "to_v": read, "to_out_0": width}
                self.shapes |= {f"{block}_{attention}_{part}": (width, size) for part, size in inputs.items()}


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
