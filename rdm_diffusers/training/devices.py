"""Where a run's networks are, and how they compute there; none of it changes a result beyond rounding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import free_memory
from torch import nn

from ..config import MemoryConfig
from ..families import Family
from ..networks import Networks
from ..sharding import is_sharded, shard

RECOMPILE_LIMIT = 64  # a block is compiled anew for each role, with and without gradients, and each size of batch


@contextmanager
def on_device(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Moves the modules to the device, and afterwards back to where they were; frees the device's memory."""
    homes = [next(chain(module.parameters(), module.buffers())).device for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)
        free_memory()


def place(networks: Networks, accelerator: Accelerator) -> None:
    """Puts the three roles on the device, or in shards on all devices where FSDP was asked for.

    It comes before the optimisers. A quantised teacher beside full-weight roles stays whole. Full networks in shards
    are cast to the compute dtype as they are gathered, and need no autocast.
    """
    sharded = is_sharded(accelerator)
    dtype = networks.compute_dtype if networks.autocast_roles else None

    def put(network: nn.Module) -> None:
        if sharded and getattr(network, "hf_quantizer", None) is None:
            shard(network, accelerator, dtype)
        else:
            network.to(accelerator.device)

    networks.place(put)
    if sharded:
        networks.compute_dtype = None


def prepare_denoiser(denoiser: ModelMixin, memory: MemoryConfig, family: Family) -> None:
    """Turns gradient checkpointing and a kind of attention on, before adapters are added; ValueError if it cannot."""
    if memory.gradient_checkpointing:
        family.checkpoint(denoiser)
    if memory.enable_xformers_memory_efficient_attention:
        try:
            denoiser.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"--enable_xformers_memory_efficient_attention does not work here ({str(error).splitlines()[0]}); "
                "leave it out, as torch's own attention is as good on most GPUs, or pip install "
                "'rdm-diffusers[xformers]'."
            ) from error
    if memory.attention_backend:
        _use_backend(denoiser, memory.attention_backend)


def prepare_vae(vae: ModelMixin, memory: MemoryConfig) -> None:
    """Turns an autoencoder's tiles and slices on; ValueError if it has none.

    One that leaves float16's range, as its configuration says, becomes float32, as in diffusers' own pipelines.
    """
    if vae.dtype == torch.float16 and vae.config.get("force_upcast", False):
        nn.Module.to(vae, torch.float32)
    for kind in ("tiling", "slicing"):
        if getattr(memory, f"enable_vae_{kind}"):
            try:
                getattr(vae, f"enable_{kind}")()
            except (AttributeError, NotImplementedError) as error:
                raise ValueError(
                    f"--enable_vae_{kind} does not work here, because {type(vae).__name__} has no {kind}; leave it out."
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


def use_channels_last(network: nn.Module) -> None:
    """Lays out frozen convolutions as `torch.channels_last`; trained ones stay, so that gradients have one layout."""
    for parameter in network.parameters():
        if parameter.ndim == 4 and not parameter.requires_grad:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def compile_blocks(denoiser: ModelMixin, memory: MemoryConfig) -> None:
    """Has torch compile the blocks that a network repeats, with `--torch_compile`; after adapters are added."""
    if not memory.torch_compile:
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    repeated = denoiser._repeated_blocks or denoiser._no_split_modules
    for module in denoiser.modules():
        if type(module).__name__ in repeated:
            module.compile(backend=memory.torch_compile_backend)
