"""The time grids of few-step samplers, as plain lists of times or of flow sigmas, the noisiest first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

from torch import Tensor

Level = TypeVar("Level", float, Tensor)
TOLERANCE = 1e-6  # two float32 sigmas this close count as equal


def make_grid(
    config: Any, own: list | None, train_steps: int, count: int, sigmas: Sequence[float] = (), mu: float | None = None
) -> list:
    """The times of `count` steps; `own` are the student's, `sigmas` (empty for none) and `mu` the caller's."""
    if own is not None and count == len(own) and (not sigmas or _are_even(sigmas)):
        return own
    if config.prediction_type == "flow_prediction":
        make_sigmas = _shifted_sigmas if config.student_sigmas is None else _students_sigmas
        return [sigma * train_steps for sigma in make_sigmas(config, count, sigmas, mu)]
    if own is not None and count < len(own) and config.eta:
        return [own[i * len(own) // count] for i in range(count)]  # as `LCMScheduler` picks them
    return [round(train_steps * (count - i) / count) - 1 for i in range(count)]


def _even_sigmas(count: int) -> list[float]:
    """1, 1 - 1/count, ..., 1/count: what stock flow pipelines pass if their caller passes nothing."""
    return [(count - i) / count for i in range(count)]


def _are_even(sigmas: Sequence[float]) -> bool:
    return all(math.isclose(*pair, abs_tol=TOLERANCE) for pair in zip(sigmas, _even_sigmas(len(sigmas)), strict=True))


def _students_sigmas(config: Any, count: int, sigmas: Sequence[float], mu: float | None) -> Sequence[float]:
    """As the student's exported scheduler has them: even ones are stretched from its first to its last sigma."""
    own = config.student_sigmas
    if sigmas and (len(own) == 1 or not _are_even(sigmas)):
        return sigmas
    first, last = own[0], own[-1] if len(own) > 1 else 1 / config.num_train_timesteps
    return [first + i * (last - first) / (count - 1) if i else first for i in range(count)]


def _shifted_sigmas(config: Any, count: int, sigmas: Sequence[float], mu: float | None) -> Sequence[float]:
    """As `FlowMatchEulerDiscreteScheduler` with the same configuration has them."""
    shift = config.shift
    if config.use_dynamic_shifting:
        if mu is None:
            raise ValueError("use_dynamic_shifting needs mu; give it, or set use_dynamic_shifting to false.")
        shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
    result = [shifted(sigma, shift) for sigma in sigmas or _even_sigmas(count)]
    return stretched(result, config.shift_terminal) if config.shift_terminal else result


def stretched(sigmas: Sequence[float], last: float) -> Sequence[float]:
    """Sigmas, from 1, moved so that they end at `last`; a single 1 stays."""
    length = 1 - sigmas[-1]
    return [1 - (1 - sigma) * (1 - last) / length for sigma in sigmas] if length else sigmas


def shifted(level: Level, shift: float) -> Level:
    """Noise levels in [0, 1], a number or a tensor, with the shift of flow schedulers: above 1 is towards noise."""
    return shift * level / (1 + (shift - 1) * level)


def check_grid(grid: Sequence[float], top: float, whole: bool) -> None:
    """Raises ValueError unless times descend strictly within 0 and `top`, in whole numbers where `whole`."""
    descends = all(earlier > later for earlier, later in pairwise(grid))
    if not (descends and all(0 <= time <= top for time in grid)):  # in this form NaN is refused, too
        raise ValueError(f"The grid {[float(t) for t in grid]} must descend strictly and lie between 0 and {top}.")
    if whole and any(time != int(time) for time in grid):
        raise ValueError(f"The grid {[float(t) for t in grid]} must consist of whole timesteps.")


def check_request(count: int | None, timesteps: Sequence | None, sigmas: Sequence | None, is_flow: bool) -> None:
    """Raises ValueError for contradictory arguments of `set_timesteps`, where stock schedulers refuse them."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("Both timesteps and sigmas are given; give one of them.")
    if sigmas is not None and not is_flow:
        raise ValueError("sigmas are for flow matching, which this student does not use; give timesteps instead.")
    grid = timesteps if timesteps is not None else sigmas
    if grid is not None and count is not None and (not is_flow or count != len(grid)):
        raise ValueError(f"num_inference_steps is {count}, and a grid of {len(grid)} steps is given; give one of them.")
