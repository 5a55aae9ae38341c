"""LoRA adapters with float32 weights that compute in the dtype of their input.

peft computes in the dtype of an adapter's weights. On a bf16 base, float32 adapters would mean float32 matrix products,
at a sixteenth of the speed of bf16 ones, and float32 copies of every activation that an adapter reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
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


def add_adapters(denoiser: ModelMixin, adapters: Mapping[str, LoraConfig], seeds: Mapping[str, int]) -> None:
    """Adds LoRAs with trainable float32 weights that compute in the dtype of their input.

    Args:
        denoiser: changed in place. On the meta device, its adapters are on it, too.
        adapters: the shape of each by its name; all of a denoiser's, because peft freezes those that were there before.
        seeds: of the adapters whose first weights are not to depend on torch's global generator.
    """
    device = torch.device("meta") if denoiser.device.type == "meta" else nullcontext()
    with warnings.catch_warnings(), device:
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is intended
        for name, lora_config in adapters.items():
            with torch.random.fork_rng(devices=[], enabled=name in seeds):
                if name in seeds:
                    torch.manual_seed(seeds[name])
                denoiser.add_adapter(lora_config, name)
    for parameter in chain(*(adapter_parameters(denoiser, name) for name in adapters)):
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    for layer in lora_layers(denoiser).values():
        matrices = [*layer.lora_A.values(), *layer.lora_B.values()]
        if all(type(matrix) in CASTING for matrix in matrices):  # other kinds of layers stay as peft makes them
            layer.cast_input_dtype_enabled = False  # peft's own cast to the dtype of the weights
            for matrix in matrices:
                matrix.__class__ = CASTING[type(matrix)]


def adapter_parameters(denoiser: nn.Module, name: str) -> list[nn.Parameter]:
    """An adapter's parameters, in a fixed order."""
    return [p for key, p in denoiser.named_parameters() if "lora_" in key and f".{name}." in key]


def lora_layers(denoiser: nn.Module) -> dict[str, LoraLayer]:
    """The layers that have adapters, by name."""
    return {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}


def folded_weights(layers: Mapping[str, LoraLayer], adapter: str) -> dict[str, Tensor]:
    """The base's weights with an adapter folded in, `W + scale B A`, by their names. Gradients flow to the adapter."""
    weights = {}
    for name, layer in layers.items():
        base = layer.get_base_layer().weight
        weights[f"{name}.base_layer.weight"] = base + layer.get_delta_weight(adapter).to(base.dtype)
    return weights


class AdapterSwitch:
    """Turns a network's adapters on, one at a time.

    A light switch: unlike peft's own it leaves `requires_grad` alone and takes microseconds.

    Args:
        denoiser: with its adapters; none is on at first.
        stays_off: no adapter's layers are ever run; for those that are folded into the base's weights.
    """

    def __init__(self, denoiser: nn.Module, stays_off: bool = False) -> None:
        self.layers, self.stays_off = lora_layers(denoiser), stays_off
        self._turn(None)

    @contextmanager
    def on(self, adapter: str | None) -> Iterator[None]:
        """A context in which this adapter is on, or none; afterwards it is the one that was on before."""
        before = self._active
        self._turn(adapter)
        try:
            yield
        finally:
            self._turn(before)

    def _turn(self, adapter: str | None) -> None:
        self._active = adapter
        for layer in self.layers.values():
            layer._disable_adapters = adapter is None or self.stays_off
            if adapter is not None:
                layer._active_adapter = [adapter]
