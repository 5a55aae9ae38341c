"""What a run will need of memory, from configurations alone: no weights are loaded, nothing is allocated."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import ModelMixin
from torch import Tensor, nn

from ..families import Conditioning, Family, PromptOptions, check_lora, family_of, pipeline_config
from ..tiny import resolve_teacher
from .setup import DTYPES, lora_config, prompt_options

GIB = 2**30
READ_BY_VALUE = ("prompt_embeds_mask", "prompt_length")  # their shapes alone do not say how long a prompt is


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, and parameters by component.

    Args:
        sizes: bytes; all together are an upper bound, as not all are needed at once.
        parameters: of each component, and of one LoRA (`lora`).
        lora_layers: how many layers a LoRA adapts.
    """

    sizes: dict[str, int]
    parameters: dict[str, int]
    lora_layers: int

    def as_table(self) -> str:
        """Plain text, in millions of parameters and GiB."""
        lines = [f"{name:<32}{count / 1e6:>12,.1f} M parameters" for name, count in self.parameters.items()]
        lines.append(f"{'layers with a LoRA':<32}{self.lora_layers:>12,}")
        total = {"together": sum(self.sizes.values())}
        lines += [f"{name:<32}{size / GIB:>12.2f} GiB" for name, size in {**self.sizes, **total}.items()]
        return "\n".join(lines)


def plan_memory(args: argparse.Namespace) -> MemoryPlan:
    """The plan of a LoRA run.

    Args:
        args: the run's arguments.

    Raises:
        ValueError: as `pipeline_config`, `family_of` and `check_lora`.
    """
    options, dtype = prompt_options(args), DTYPES[args.mixed_precision]
    config = pipeline_config(args.pretrained_model_name_or_path, revision=args.revision)
    family = family_of(config)
    check_lora(family)
    models = meta_models(args.pretrained_model_name_or_path, config, args.revision)
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    denoiser: Any = models[family.denoiser_name]
    denoiser.requires_grad_(False).to(dtype)
    with torch.device("meta"):
        denoiser.add_adapter(lora_config(family, args))
    adapter = [parameter.numel() for parameter in denoiser.parameters() if parameter.requires_grad]
    lora, base = sum(adapter), counts[family.denoiser_name]
    pipeline = meta_pipeline(family, models)
    sizes = {
        f"{family.denoiser_name}, frozen": base * dtype.itemsize,
        "text encoders and autoencoder": (sum(counts.values()) - base) * dtype.itemsize,
        "two LoRAs and their gradients": 2 * lora * 8,
        "two optimisers": 2 * lora * (2 if args.use_8bit_adam else 8),
        "the student's moving average": lora * 4 if args.use_ema else 0,
        f"activations of {args.train_batch_size} samples": activations(
            family, pipeline, options, args.train_batch_size, dtype
        ),
    }
    return MemoryPlan(sizes, {**counts, "lora": lora}, len(adapter) // 2)


def meta_models(name_or_path: str, config: dict[str, Any], revision: str | None) -> dict[str, nn.Module]:
    """The networks of a `pipeline_config` on the meta device, by component, from their configurations."""
    models: dict[str, nn.Module] = {}
    libraries = {"diffusers": diffusers, "transformers": transformers}
    for name, entry in config.items():
        library, class_name = entry if isinstance(entry, list | tuple) else (None, None)
        kind: Any = getattr(libraries.get(library), class_name or "", None)
        if not _is_network(kind):
            continue
        source = dict(subfolder=name, revision=revision)
        if issubclass(kind, ModelMixin):
            settings = kind.load_config(resolve_teacher(name_or_path), **source)
        else:
            settings = kind.config_class.from_pretrained(resolve_teacher(name_or_path), **source)
        with torch.device("meta"):
            models[name] = kind.from_config(settings) if issubclass(kind, ModelMixin) else kind(settings)
    return models


def _is_network(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def meta_pipeline(family: Family, models: dict[str, nn.Module]) -> diffusers.DiffusionPipeline:
    """The stock pipeline of networks on the meta device, which knows its sizes and cannot be called."""
    parts, _ = family.pipeline_class._get_signature_keys(family.pipeline_class)
    return family.pipeline_class(**{name: models.get(name) for name in parts})


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention that keeps what fused kernels keep for backward: queries, keys, values and the result."""
    stock = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _Fused.apply(query, key, value)

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result)
        return result


def activations(
    family: Family, pipeline: diffusers.DiffusionPipeline, options: PromptOptions, batch: int, dtype: torch.dtype
) -> int:
    """Bytes that one forward of the student keeps for its backward, without gradient checkpointing; estimated."""
    kept: dict[int, int] = {}
    denoiser = family.denoiser(pipeline)
    own = {parameter.untyped_storage()._cdata for parameter in denoiser.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    shapes = family.conditioning_shapes(pipeline, options)
    tokens = shapes["prompt_embeds"][0]
    tensors = {name: _stand_in(name, (batch, *shape), dtype, tokens) for name, shape in shapes.items()}
    x_t = torch.empty(batch, *family.latent_shape(pipeline, options.resolution), device="meta")
    t = torch.empty(batch, device="meta")
    with fused_attention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = family.denoise(denoiser, x_t, t, Conditioning(tensors))
    assert output.shape == x_t.shape
    return sum(kept.values())


def _stand_in(name: str, shape: tuple[int, ...], dtype: torch.dtype, tokens: int) -> Tensor:
    if name in READ_BY_VALUE:
        return torch.full(shape, 1 if name.endswith("mask") else tokens)
    return torch.empty(shape, dtype=dtype, device="meta")
