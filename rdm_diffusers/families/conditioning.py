"""What a denoiser reads besides the noisy latents and the time, and how prompts are read for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..sizes import Resolution


@dataclass(frozen=True)
class Conditioning:
    """What a family's denoiser needs besides x_t and t: named tensors, each `[B, ...]` along the same batch."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        """The selected samples, as a `Conditioning`."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand(self, batch: int) -> Conditioning:
        """A conditioning of length 1, repeated `batch` times without copying."""
        return Conditioning({name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """On another device, with the floating-point tensors in `dtype`."""
        dtypes = {name: dtype if each.is_floating_point() else each.dtype for name, each in self.tensors.items()}
        return Conditioning({name: each.to(device, dtypes[name]) for name, each in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Joined along the batch; all parts must name the same tensors."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class PromptOptions:
    """How prompts are read, by teacher and student alike.

    Args:
        max_sequence_length: tokens that the large text encoder reads, if there is one; by default the family's
            `prompt_tokens`.
        resolution: pixels per side, or "WIDTHxHEIGHT"; by default the teacher's own.
        embedded_guidance: the guidance that a guidance-distilled denoiser gets as an input.
    """

    max_sequence_length: int | None = None
    resolution: Resolution | None = None
    embedded_guidance: float | None = None

    @property
    def length(self) -> dict[str, int]:
        """`max_sequence_length` as an argument of the stock pipeline, if it is set."""
        return {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}


def encoding_device(pipeline: DiffusionPipeline) -> torch.device:
    """The device of a pipeline's text encoders, which may differ from that of its other networks."""
    return next(pipeline.text_encoder.parameters()).device
