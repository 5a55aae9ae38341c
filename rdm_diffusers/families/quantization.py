"""Frozen networks in 8 or 4 bits, by the back ends that diffusers has for it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig

# name -> the package that does it
QUANTIZATIONS = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
NEEDS_GPU = ("nf4",)  # diffusers asks for one


def quantized_loading(kind: str, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """What `ModelMixin.from_pretrained` is told to quantise the linear layers' weights while it loads them.

    Args:
        kind: one of `QUANTIZATIONS`: int8 and fp8 (e4m3) weights with a scale a row, or QLoRA's nf4 (arXiv 2305.14314)
            with quantised scales.
        dtype: what is computed in, and what all other weights are kept in.
        device: where bitsandbytes makes the quantised network; torchao's is made on the CPU.

    Raises:
        ImportError: if the package is missing.
        ValueError: for nf4 without a GPU.
    """
    check_quantization(kind, device)
    if kind == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        )
        return {"quantization_config": config, "device_map": {"": str(device)}}
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    # On the CPU: a device map that names the CPU would have diffusers leave the weights as they are.
    return {
        "quantization_config": TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())
    }


def check_quantization(kind: str, device: torch.device | str) -> None:
    """Refuses what this machine cannot quantise. Raises as `quantized_loading`."""
    package = QUANTIZATIONS[kind]
    if find_spec(package) is None:
        raise ImportError(f"Weights in {kind} need {package}: pip install 'rdm-diffusers[quantization]'.")
    if kind in NEEDS_GPU and torch.device(device).type == "cpu":
        raise ValueError(f"Weights in {kind} need a GPU; choose int8 or fp8 on a machine without.")
