"""LoRAs of the tiny Stable Diffusion pipeline, good and bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import _collate_lora_metadata
from parts import make_pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from rdm_diffusers.families import LORA_FILE

ALL = ("to_q", "conv1", "conv_in", "linear_1")  # a student adapts the first two
OWN = ALL[:2]
TEXT = ("q_proj", "fc1")
RANK = 3


def write_lora(folder: Path, unet: tuple[str, ...] = ALL, text: tuple[str, ...] = (), **options) -> Path:
    """A LoRA of the tiny Stable Diffusion pipeline, in diffusers' format; its alpha is not its rank."""
    pipeline, layers = make_pipeline(), {"unet": unet, "text_encoder": text}
    parts = {name: getattr(pipeline, name) for name, own in layers.items() if own}
    generator = torch.Generator().manual_seed(5)
    for name, network in parts.items():
        network.add_adapter(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(layers[name]), **options))
        for key, parameter in network.named_parameters():
            if "lora_" in key:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    weights = {f"{name}_lora_layers": get_peft_model_state_dict(network) for name, network in parts.items()}
    pipeline.save_lora_weights(folder, **weights, **_collate_lora_metadata(parts))
    return folder


def write_loras(folder: Path) -> dict[str, Path]:
    """LoRAs by what they are: files and folders."""
    found = {
        "style": write_lora(folder / "style"),
        "few-step": write_lora(folder / "few-step", OWN),
        "with text": write_lora(folder / "text", text=TEXT),
        "dora": write_lora(folder / "dora", OWN, use_dora=True),
        "empty": folder / "empty",
        "pickled": folder / "pickled",
    }
    for name, file in {"empty": "README.md", "pickled": "pytorch_lora_weights.bin"}.items():
        found[name].mkdir()
        (found[name] / file).touch()
    wide = {name: tensor.repeat(1, 2, *[1] * (tensor.ndim - 2)) if "lora_A" in name else tensor
            for name, tensor in load_file(found["style"] / LORA_FILE).items()}  # fmt: skip
    save_file(wide, folder / "wide.safetensors")
    save_file({"unet.nowhere.lora_A.weight": torch.ones(1, 2), "unet.nowhere.lora_B.weight": torch.ones(2, 1)},
              folder / "elsewhere.safetensors")  # fmt: skip
    header = {LORA_ADAPTER_METADATA_KEY: json.dumps({"unet.r": 3, "unet.target_modules": "(a+)+$"})}
    save_file(load_file(found["few-step"] / LORA_FILE), folder / "hostile.safetensors", header)
    (folder / "cut.safetensors").write_bytes(b"cut")
    return found | {path.stem: path for path in folder.glob("*.safetensors")}
