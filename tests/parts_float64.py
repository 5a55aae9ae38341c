"""Invariants in float64, where rounding is some 1e-16 on any processor, though the package itself asks for float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rdm_diffusers.tiny.domains import reader_of

ROUNDING = (
    1e-9  # far above float64's 1e-16 after a network and the differences that R_dm takes, and far below any error
)
READS_BYTES = {Tensor.view, torch.frombuffer, torch.asarray}  # their dtype says what is there, not what is wanted


class _Float64(TorchFunctionMode):
    """Whatever asks for float32 gets float64, and float32 weights are widened where they meet float64 numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if function in READS_BYTES:
            return function(*args, **kwargs)
        if function is Tensor.float:
            function = Tensor.double
        wide = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in (*args, *kwargs.values()))
        widens = wide and not getattr(function, "__name__", "_").endswith("_")
        args = [_wider(value, widens) for value in args]
        return function(*args, **{name: _wider(value, widens) for name, value in kwargs.items()})


def _wider(value: Any, widens: bool) -> Any:
    if value is torch.float32:
        return torch.float64
    return value.double() if widens and isinstance(value, Tensor) and value.dtype == torch.float32 else value


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, all that is computed is computed in float64; weights that are loaded still come in float32."""
    torch.set_default_dtype(torch.float64)
    reader_of.cache_clear()  # what is kept inside is not for outside, and the other way round
    try:
        with _Float64():
            yield
    finally:
        reader_of.cache_clear()
        torch.set_default_dtype(torch.float32)
