"""One full network for each role."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..adapters import AdapterSwitch, adapter_parameters, add_adapters
from ..sharding import whole_copies
from .base import ADAPTERS, FAKE_SCORE, ROLES, STUDENT, TARGET, TEACHER, Networks


@dataclass(eq=False, repr=False)
class SeparateNetworks(Networks):
    """One full network for each role; the target is a LoRA on the teacher's.

    Args:
        denoisers: a module for each role, perhaps without a fake score; the teacher's is frozen here.
    """

    denoisers: Mapping[str, nn.Module]
    autocast_roles = (STUDENT, FAKE_SCORE)

    def __post_init__(self) -> None:
        teacher: Any = self.denoisers[TEACHER].requires_grad_(False)
        if self.target_config is not None:
            add_adapters(teacher, {ADAPTERS[TARGET]: self.target_config})
        self._switch = AdapterSwitch(teacher)

    def _own_parameters(self, role: str) -> list[nn.Parameter]:
        if role in (TEACHER, TARGET):
            return adapter_parameters(self.denoisers[TEACHER], ADAPTERS[TARGET]) if role == TARGET else []
        own = self.denoisers[role].parameters() if role in self.denoisers else ()
        return [parameter for parameter in own if parameter.requires_grad]

    def _switched_to(self, role: str) -> AbstractContextManager[None]:
        return self._switch.on(ADAPTERS[TARGET] if role == TARGET else None)

    def student_weights(self, keep: bool = True) -> dict[str, Tensor]:
        return whole_copies(self.denoisers[STUDENT].state_dict(), keep)

    @property
    def modules(self) -> list[nn.Module]:
        return [self.denoisers[role] for role in ROLES if role in self.denoisers]

    def _network(self, role: str) -> nn.Module:
        return self.denoisers[TEACHER if role == TARGET else role]
