"""One frozen base with a LoRA for each role, so that a student costs little more memory than its teacher.

It has a trap: with another adapter in the backward than in the forward, gradients are missing or wrong, without an
error. `Networks.backward` and `pull_back` restore the role first.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from torch.func import functional_call

from ..adapters import AdapterSwitch, adapter_parameters, add_adapters, folded_weights
from ..sharding import whole_copies
from .base import ADAPTERS, FAKE_SCORE, STUDENT, TARGET, TEACHER, Networks


@dataclass(eq=False, repr=False)
class SharedBase(Networks):
    """One frozen base with two LoRAs: adapter `default` is the student, `fake_score` the fake score, none the teacher.

    Args:
        denoiser: the teacher's network; it is frozen, and both adapters are added to it. The meta device will do.
        lora_config: the shape of both adapters.
        fold_adapters: compute `W + scale B A` once per update and run the base with that, instead of the adapters' own
            small layers: the same to rounding, in fewer operations, for one more copy of the adapted weights per role.
        has_fake_score: whether there is a fake score.

    Raises:
        ValueError: if adapters are to be folded under gradient checkpointing, whose recomputation would not see them,
            or into a base that is not float32, which would round them away.
    """

    denoiser: ModelMixin
    lora_config: LoraConfig
    fold_adapters: bool = field(default=False, kw_only=True)
    has_fake_score: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if self.fold_adapters and getattr(self.denoiser, "is_gradient_checkpointing", False):
            raise ValueError("--fold_adapters and --gradient_checkpointing exclude each other; drop one of them.")
        if self.fold_adapters and torch.finfo(self.denoiser.dtype).bits < 32:
            raise ValueError("--fold_adapters needs a float32 base: a coarser one rounds the adapters away.")
        fake_score = self.lora_config if self.has_fake_score else None
        shapes = {STUDENT: self.lora_config, FAKE_SCORE: fake_score, TARGET: self.target_config}
        self.adapters = {role: ADAPTERS[role] for role, shape in shapes.items() if shape is not None}
        add_adapters(self.denoiser.requires_grad_(False), {ADAPTERS[r]: s for r, s in shapes.items() if s is not None})
        self._switch = AdapterSwitch(self.denoiser, stays_off=self.fold_adapters)
        self.layers = self._switch.layers
        self._find_trainable()
        self._folded: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}

    def _own_parameters(self, role: str) -> list[nn.Parameter]:
        return self._trainable.get(role, [])

    def student_weights(self, keep: bool = True) -> dict[str, Tensor]:
        return whole_copies(get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTERS[STUDENT]), keep)

    @property
    def modules(self) -> list[nn.Module]:
        return [self.denoiser]

    def place(self, move: Callable[[nn.Module], None]) -> None:
        super().place(move)
        self._find_trainable()

    def _find_trainable(self) -> None:
        self._trainable = {role: adapter_parameters(self.denoiser, adapter) for role, adapter in self.adapters.items()}

    def _switched_to(self, role: str) -> AbstractContextManager[None]:
        return self._switch.on(self.adapters.get(role))

    def _network(self, role: str) -> Any:
        if not self.fold_adapters or role == TEACHER:
            return self.denoiser
        weights = self._weights(role)
        return lambda *args, **kwargs: functional_call(self.denoiser, weights, args, kwargs, tie_weights=False)

    def _weights(self, role: str) -> dict[str, Tensor]:
        """The base's weights with the role's adapter folded in; without a graph they are kept until it changes.

        The adapter's numbers are compared, not their version counters, which moving averages and checkpoints bypass.
        """
        if torch.is_grad_enabled():
            return folded_weights(self.layers, self.adapters[role])
        adapter = torch.cat([parameter.detach().flatten() for parameter in self._trainable[role]])
        if role not in self._folded or not torch.equal(self._folded[role][0], adapter):
            self._folded[role] = adapter, folded_weights(self.layers, self.adapters[role])
        return self._folded[role][1]
