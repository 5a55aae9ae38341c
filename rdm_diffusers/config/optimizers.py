"""The optimisers that a run can have, by transformers' names (`--optim`)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .subjects import MemoryConfig


@dataclass(frozen=True)
class OptimizerKind:
    """A kind of AdamW: where it is, and what its states take."""

    package: str
    name: str  # of the class
    bits: int = 32  # of a number in either of the two states
    block: int = 256  # numbers that share a scale, below 32 bits
    is_paged: bool = False  # whether the states move to the machine's memory where the GPU's is full
    is_fused: bool = False

    @property
    def module(self) -> str:
        """The module that has the class."""
        return f"{self.package}.optim"

    @property
    def label(self) -> str:
        """Its name on a card."""
        return "AdamW" + (f" in {self.bits} bits" if self.bits < 32 else "") + (", paged" if self.is_paged else "")


USUAL = "adamw_torch"
OPTIMIZERS = {
    USUAL: OptimizerKind("torch", "AdamW"),
    "adamw_torch_fused": OptimizerKind("torch", "AdamW", is_fused=True),
    "adamw_torch_8bit": OptimizerKind("torchao", "AdamW8bit", 8),
    "adamw_torch_4bit": OptimizerKind("torchao", "AdamW4bit", 4, 128),
    "adamw_bnb_8bit": OptimizerKind("bitsandbytes", "AdamW8bit", 8),
    "paged_adamw_32bit": OptimizerKind("bitsandbytes", "PagedAdamW32bit", is_paged=True),
    "paged_adamw_8bit": OptimizerKind("bitsandbytes", "PagedAdamW8bit", 8, is_paged=True),
}
EIGHT_BIT = ("adamw_bnb_8bit", "adamw_torch_8bit")  # --use_8bit_adam is the first that is installed


def asked_for(memory: MemoryConfig) -> str:
    """The flag that names the optimiser."""
    return "--use_8bit_adam" if memory.use_8bit_adam else f"--optim {memory.optim}"


def kinds_of(memory: MemoryConfig) -> list[OptimizerKind]:
    """The optimisers that would do, the first one best."""
    return [OPTIMIZERS[name] for name in (EIGHT_BIT if memory.use_8bit_adam else (memory.optim,))]


def kind_of(memory: MemoryConfig) -> OptimizerKind:
    """The optimiser of a run; ImportError if its package is not installed."""
    kinds = kinds_of(memory)
    for kind in kinds:
        if find_spec(kind.package) is not None:
            return kind
    needed = " or ".join(kind.package for kind in kinds)
    extra = "8bit" if kinds[0].package == "bitsandbytes" else "quantization"
    raise ImportError(f"{asked_for(memory)} needs {needed}: pip install 'rdm-diffusers[{extra}]'.")
