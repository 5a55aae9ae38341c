"""LoRA layers whose weights stay float32 and which compute in the dtype of their input.

peft computes an adapter in the dtype of its weights: beside a bf16 base, float32 adapters mean float32 matrix products,
at a sixteenth of the speed of bf16 ones, and float32 copies of every activation that an adapter reads.
"""

from __future__ import annotations

import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class _Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


CASTING: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, nn.Conv2d: _Conv2d}


def compute_in_input_dtype(layer: LoraLayer) -> None:
    """Has all adapters of a layer compute in the dtype of the layer's input, whatever the dtype of their weights.

    The weights keep their dtype, and so do their gradients. In float32 nothing changes. Kinds of adapters that are
    neither linear nor 2-D convolutions stay as they are.

    Args:
        layer: a layer with adapters; changed in place.
    """
    adapters = [*layer.lora_A.values(), *layer.lora_B.values()]
    if all(type(adapter) in CASTING for adapter in adapters):
        layer.cast_input_dtype_enabled = False  # peft's own cast, to the dtype of the weights
        for adapter in adapters:
            adapter.__class__ = CASTING[type(adapter)]
