"""f-divergences D_f(p || q) = E_q[f(p / q)], by what their gradients need of f: h(r) = r^2 f''(r), r = p / q.

    reverse_kl            f = -log r                      h = 1
    softened_reverse_kl   f = (r + 1) log((r + 1) / 2r)   h = 1 / (1 + r)
    jensen_shannon        f = r log r - (r + 1) log((r + 1) / 2)   h = r / (1 + r)
    squared_hellinger     f = 1 - sqrt(r)                 h = sqrt(r) / 4
    forward_kl            f = r log r                     h = r
    jeffreys              f = (r - 1) log r               h = 1 + r

p is the teacher's density and q the student's (f-distill, arXiv 2502.15681). Here each h is divided by h(1), so that it
is 1 where student and teacher agree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _reverse_kl(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones_like(r), torch.zeros_like(r), torch.zeros_like(r)


def _softened_reverse_kl(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return 2 / (1 + r), -2 * r / (1 + r) ** 2, 4 * r**2 / (1 + r) ** 3


def _jensen_shannon(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return 2 * r / (1 + r), 2 * r / (1 + r) ** 2, -4 * r**2 / (1 + r) ** 3


def _squared_hellinger(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    root = r.sqrt()
    return root, root / 2, -root / 4


def _forward_kl(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return r, r, torch.zeros_like(r)


def _jeffreys(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (1 + r) / 2, r / 2, torch.zeros_like(r)


_FUNCTIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "reverse_kl": _reverse_kl,
    "softened_reverse_kl": _softened_reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "squared_hellinger": _squared_hellinger,
    "forward_kl": _forward_kl,
    "jeffreys": _jeffreys,
}
F_DIVERGENCES = tuple(_FUNCTIONS)


def weights(divergence: str, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h(r), r h'(r) and r^2 h''(r), each over h(1), for ratios `[M]`.

    Raises:
        ValueError: for an unknown divergence.
    """
    if divergence not in _FUNCTIONS:
        raise ValueError(f"Unknown f-divergence {divergence!r}; use one of {', '.join(F_DIVERGENCES)}.")
    return _FUNCTIONS[divergence](ratio)
