"""The memory that networks need, measured on the meta device, where tensors have sizes and no numbers.

PyTorch's own `MemTracker` does not replace this: it refuses frozen parameters and takes about thirty times as long, and
fake tensors of a GPU need a build of torch for GPUs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import ModelMixin
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..families import Conditioning, Family, PromptOptions
from ..networks import STUDENT, Networks
from ..tiny import resolve_teacher

READ_BY_VALUE = ("prompt_embeds_mask", "prompt_length")  # their values, not their shapes, hold a prompt's length
# The operations of diffusers' networks that torch.autocast lowers and raises on a GPU.
LOWERED = {"linear", "conv2d", "matmul", "__matmul__", "bmm", "baddbmm", "addmm"}
RAISED = {"layer_norm", "group_norm", "softmax", "log_softmax", "pow", "__pow__", "rsqrt", "norm", "cumsum", "exp"}


def meta_models(name_or_path: str, config: dict[str, Any], revision: str | None) -> dict[str, nn.Module]:
    """The networks of a `pipeline_config` by component, in float32, on the meta device."""
    models: dict[str, nn.Module] = {}
    libraries = {"diffusers": diffusers, "transformers": transformers}
    for name, entry in config.items():
        names = isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
        library, class_name = entry if names else ("", "")  # some settings are lists, too
        kind: Any = getattr(libraries.get(library), class_name, None)
        if nn.Module not in getattr(kind, "__mro__", ()):
            continue
        is_ours = issubclass(kind, ModelMixin)
        read = kind.load_config if is_ours else kind.config_class.from_pretrained
        settings = read(resolve_teacher(name_or_path), subfolder=name, revision=revision)
        with torch.device("meta"), no_init_weights():
            model = kind.from_config(settings) if is_ours else kind(settings)
        models[name] = model.eval().requires_grad_(False)
    return models


def meta_pipeline(family: Family, models: dict[str, nn.Module]) -> diffusers.DiffusionPipeline:
    """The stock pipeline of networks on the meta device; it cannot be called."""
    parts, _ = family.pipeline_class._get_signature_keys(family.pipeline_class)
    networks = {name: models.get(name) for name in parts}
    return family.pipeline_class(**networks | family.load_options | family.blank_components())


def nbytes(*modules: nn.Module) -> int:
    """Bytes of all weights and buffers."""
    return sum(tensor.nbytes for module in modules for tensor in [*module.parameters(), *module.buffers()])


class LivePeak(TorchDispatchMode):
    """Counts the bytes of tensors created inside it (`now`), and the most at any time (`peak`).

    Temporary buffers inside kernels are not counted, nor are the modules' weights, buffers and existing gradients.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._counted: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._counted.add(tensor.untyped_storage())
                if tensor.grad is not None:
                    self._counted.add(tensor.grad.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.where.self:  # a mask that is read by its values is on the CPU
            args = tuple(value.to(args[1].device) for value in args)
        result = func(*args, **(kwargs or {}))
        for leaf in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self._counted:
                self._counted.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention that saves for backward what fused kernels save.

    That is queries, keys, values, the result, a number a row, and the mask.
    """
    stock = F.scaled_dot_product_attention

    def fused(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        result: Tensor = _Fused.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
        return result

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, rows, mask)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None)


def meta_autocast(dtype: torch.dtype | None, device_type: str) -> AbstractContextManager[Any]:
    """`torch.autocast` for the meta device, which has none, by a device's rules; no casts for None."""
    return nullcontext() if dtype is None else _MetaAutocast(dtype, device_type)


class _MetaAutocast(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype, device_type: str) -> None:
        super().__init__()
        self.dtype = dtype
        self.raised = RAISED if device_type == "cuda" else set()
        self._copies: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        cast = self._lower if name in LOWERED else self._raise if name in self.raised else None
        if cast:
            args = tuple(cast(value) for value in args)
            kwargs = {name: cast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _raise(self, value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == self.dtype else value

    def _lower(self, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        if not (tensor.requires_grad and tensor.is_leaf):
            return tensor.to(self.dtype)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.to(self.dtype)
        return self._copies[id(tensor)]

    def __exit__(self, *error: object) -> None:
        self._copies.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]


def checkpoint_blocks(network: Any, family: Family, dtype: torch.dtype | None, device_type: str) -> None:
    """Turns on a diffusers network's gradient checkpointing, with `meta_autocast` in its recomputation, too."""

    def run(block: nn.Module, *args: Any) -> Any:
        contexts = nullcontext(), meta_autocast(dtype, device_type)
        return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=lambda: contexts)

    family.checkpoint(network, run)


def quantise(model: nn.Module, kind: str) -> None:
    """Turns all linear layers of a model on the meta device into quantised ones, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            shape = module.weight.shape
            module.__class__ = {"int8": _Int8Linear, "fp8": _Fp8Linear, "nf4": _Nf4Linear}[kind]
            small = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "nf4": torch.uint8}[kind]
            # nf4 has two weights a byte, a byte for the scale of 64 weights, and a float32 for 256 scales.
            size = (shape.numel() // 2 + shape.numel() // 64 + 4 * (shape.numel() // 16384 + 1),)
            packed = torch.empty(size if kind == "nf4" else shape, dtype=small, device="meta")
            scale = torch.empty(0 if kind == "nf4" else shape[0], dtype=module.weight.dtype, device="meta")
            module.weight = nn.Parameter(packed, requires_grad=False)
            module.scale = nn.Parameter(scale, requires_grad=False)


class _Int8Linear(nn.Linear):
    """torchao's: autograd saves a copy of the weight in the input's dtype."""

    scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        flat = torch.mm(input.reshape(-1, input.shape[-1]), self.weight.t().to(input.dtype)) * self.scale
        output = flat.reshape(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output.add_(self.bias)


class _Fp8Linear(nn.Linear):
    """torchao's: as int8, with a float32 copy in between."""

    scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        output = torch.matmul(input, (self.weight.float() * self.scale[:, None]).to(input.dtype).t())
        return output if self.bias is None else output + self.bias


class _Nf4Linear(nn.Linear):
    """bitsandbytes': the backward makes its own copy of the weight in the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        shape = self.out_features, self.in_features
        result: Tensor = _Nf4.apply(input, self.bias, shape)  # type: ignore[no-untyped-call]
        return result


class _Nf4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return F.linear(input, input.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None


def conditioning(
    family: Family, pipeline: diffusers.DiffusionPipeline, options: PromptOptions, dtype: torch.dtype
) -> Conditioning:
    """The `Conditioning` of one prompt, on the meta device except for tensors whose values are read."""
    shapes = family.conditioning_shapes(pipeline, options)
    tokens = shapes["prompt_embeds"][0]

    def empty(name: str, shape: tuple[int, ...]) -> Tensor:
        if name in READ_BY_VALUE:
            return torch.full(shape, 1 if name.endswith("mask") else tokens)
        return torch.empty(shape, dtype=dtype, device="meta")

    return Conditioning({name: empty(name, (1, *shape)) for name, shape in shapes.items()})


@torch.no_grad()
def inference_peak(call: Callable[[], object], *modules: nn.Module) -> int:
    """The most bytes that a call allocates beside the modules' weights, without gradients."""
    with fused_attention(), LivePeak(*modules) as live:
        call()
    return int(live.peak)


def encoding_peak(encoder: Any, batch: int, tokens: int) -> int:
    """Bytes that a text encoder allocates to read `batch` prompts of `tokens` tokens."""
    if type(encoder).__name__.startswith("CLIP"):
        tokens = encoder.config.max_position_embeddings
    ids = torch.empty(batch, tokens, dtype=torch.long, device="meta")
    # The stock pipelines take the last layer of T5 and Gemma, and choose among all layers of the others.
    all_layers = not type(encoder).__name__.startswith(("T5", "Gemma"))
    return inference_peak(lambda: encoder(ids, output_hidden_states=all_layers), encoder)


def update_peak(
    networks: Networks, inputs: tuple[Any, ...], has_gradients: bool, dtype: torch.dtype | None, device_type: str
) -> tuple[int, int]:
    """Bytes that the student's forward saves for the backward, and the most at any time of both.

    Args:
        networks: on the meta device.
        inputs: x_t, t and the conditioning, as `predict` takes them.
        has_gradients: whether the student has gradients already, which then do not count.
        dtype, device_type: of autocast, if any.
    """
    student = networks.parameters(STUDENT)
    for parameter in student:
        parameter.grad = torch.empty_like(parameter) if has_gradients else None
    with fused_attention(), LivePeak(*networks.modules) as live:
        with meta_autocast(dtype, device_type):
            x0 = networks.predict(STUDENT, *inputs)
        saved = live.now
        networks.backward(STUDENT, x0, torch.empty_like(x0))
    for parameter in student:
        parameter.grad = None
    return saved, live.peak
