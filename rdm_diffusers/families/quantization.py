"""Frozen networks in 8 or 4 bits, by the back ends of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, ModelMixin, TorchAoConfig

QUANTIZATIONS = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}  # name -> the package that does it
NEEDS_GPU = ("nf4",)  # in diffusers


def quantized_loading(kind: str, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Arguments of `ModelMixin.from_pretrained` that quantise the weights of linear layers while loading.

    Args:
        kind: one of `QUANTIZATIONS`: int8 and fp8 (e4m3) weights with one scale per row, or QLoRA's nf4 (arXiv
            2305.14314) with quantised scales.
        dtype: of the computation, and of all other weights.
        device: where bitsandbytes makes the quantised network; torchao works on the CPU.

    Raises:
        ImportError: if the package is missing.
        ValueError: for nf4 without a GPU.
    """
    package = QUANTIZATIONS[kind]
    if find_spec(package) is None:
        raise ImportError(f"Weights in {kind} need {package}: pip install 'rdm-diffusers[quantization]'.")
    if kind in NEEDS_GPU and torch.device(device).type == "cpu":
        raise ValueError(f"Weights in {kind} need a GPU; choose int8 or fp8 on a machine without one.")
    if kind == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
        return {"quantization_config": config, "device_map": {"": str(device)}}
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    # No device map: with one that names the CPU, diffusers would not quantise at all.
    weights = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    return {"quantization_config": TorchAoConfig(weights)}


def quantised_copy(network: ModelMixin, dtype: torch.dtype, quantized: Mapping[str, Any]) -> ModelMixin:
    """A network whose weights are quantised, by way of a temporary folder (TMPDIR says where).

    diffusers quantises only while it loads a folder: its `from_single_file` takes all weights for quantised ones.

    Args:
        network: in `dtype`.
        dtype: of the computation.
        quantized: as of `quantized_loading`.
    """
    with TemporaryDirectory(prefix="rdm-") as folder:
        network.save_pretrained(folder)
        copy: ModelMixin = type(network).from_pretrained(folder, dtype=dtype, use_safetensors=True, **quantized)
        return copy
