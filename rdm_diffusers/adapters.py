"""LoRA adapters with float32 weights that compute in the dtype of their input.

peft computes in the dtype of an adapter's weights. On a bf16 base, float32 adapters would mean float32 matrix products,
at a sixteenth of the speed of bf16 ones, and float32 copies of every activation that an adapter reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import chain

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class _Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


CASTING: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, nn.Conv2d: _Conv2d}


def add_adapters(denoiser: ModelMixin, lora_config: LoraConfig, names: Iterable[str]) -> None:
    """Adds LoRAs with trainable float32 weights that compute in the dtype of their input.

    Args:
        denoiser: changed in place. On the meta device, its adapters are on it, too.
        lora_config: the shape of all of them.
        names: of the adapters.
    """
    names = list(names)
    device = torch.device("meta") if denoiser.device.type == "meta" else nullcontext()
    with warnings.catch_warnings(), device:
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is intended
        for name in names:
            denoiser.add_adapter(lora_config, name)
    for parameter in chain(*(adapter_parameters(denoiser, name) for name in names)):
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    for layer in lora_layers(denoiser).values():
        adapters = [*layer.lora_A.values(), *layer.lora_B.values()]
        if all(type(adapter) in CASTING for adapter in adapters):  # other kinds of layers stay as peft makes them
            layer.cast_input_dtype_enabled = False  # peft's own cast to the dtype of the weights
            for adapter in adapters:
                adapter.__class__ = CASTING[type(adapter)]


def adapter_parameters(denoiser: nn.Module, name: str) -> list[nn.Parameter]:
    """An adapter's parameters, in a fixed order."""
    return [p for key, p in denoiser.named_parameters() if "lora_" in key and f".{name}." in key]


def lora_layers(denoiser: nn.Module) -> dict[str, LoraLayer]:
    """The layers that have adapters, by name."""
    return {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
