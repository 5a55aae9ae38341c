"""How a network computes: checkpointing, attention, compilation. None of it changes a result beyond rounding."""

from __future__ import annotations

import warnings

import torch
from diffusers import ModelMixin

from ..config import MemoryConfig

RECOMPILE_LIMIT = 64  # a block is compiled anew for each role, with and without gradients, and each size of batch


def prepare_denoiser(denoiser: ModelMixin, memory: MemoryConfig) -> None:
    """Gradient checkpointing and the kind of attention, as the configuration says; before adapters are added.

    Raises:
        ValueError: if a kind of attention is asked for that this machine or diffusers cannot do.
    """
    if memory.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if memory.enable_xformers_memory_efficient_attention:
        _use_xformers(denoiser)
    if memory.attention_backend:
        _use_backend(denoiser, memory.attention_backend)


def _use_xformers(denoiser: ModelMixin) -> None:
    try:
        denoiser.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"--enable_xformers_memory_efficient_attention does not work here ({str(error).splitlines()[0]}); leave it "
            "out, as torch's own attention is as good on most GPUs, or pip install 'rdm-diffusers[xformers]'."
        ) from error


def _use_backend(denoiser: ModelMixin, backend: str) -> None:
    try:
        denoiser.set_attention_backend(backend)
    except (ImportError, ValueError, RuntimeError) as error:
        raise ValueError(f"--attention_backend {backend} does not work here: {str(error).splitlines()[0]}") from error
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        warnings.warn(
            f"{type(denoiser).__name__} does not heed --attention_backend {backend} and goes on with torch's own.",
            stacklevel=2,
        )


def compile_blocks(denoiser: ModelMixin, memory: MemoryConfig) -> None:
    """Has torch compile the blocks that a network repeats, with `--torch_compile`; after adapters are added."""
    if not memory.torch_compile:
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    repeated = denoiser._repeated_blocks or denoiser._no_split_modules
    for module in denoiser.modules():
        if type(module).__name__ in repeated:
            module.compile(backend=memory.torch_compile_backend)
