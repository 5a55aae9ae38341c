"""The grids that few-step samplers lay: plain lists of times or of flow sigmas, the noisiest first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

CLOSE = 1e-6  # how near two sigmas in float32 are the same


def trailing_times(train_steps: int, count: int) -> list[int]:
    """`count` whole times, evenly spaced, from `train_steps - 1` downwards."""
    return [round(train_steps * (count - i) / count) - 1 for i in range(count)]


def picked_times(times: Sequence[int], count: int) -> list[int]:
    """`count` of the times, at most all of them, as `LCMScheduler` picks them from those of its training."""
    return [times[i * len(times) // count] for i in range(count)]


def even_sigmas(count: int) -> list[float]:
    """1, 1 - 1/count, ..., 1/count: what stock flow pipelines give where their caller gives nothing."""
    return [(count - i) / count for i in range(count)]


def are_even(sigmas: Sequence[float]) -> bool:
    """Whether the sigmas are `even_sigmas`."""
    pairs = zip(sigmas, even_sigmas(len(sigmas)), strict=True)
    return all(math.isclose(given, even, abs_tol=CLOSE) for given, even in pairs)


def linear_sigmas(first: float, last: float, count: int) -> list[float]:
    """`count` sigmas from `first` to `last`, evenly spaced; `first` alone for a count of 1."""
    return [first + i * (last - first) / (count - 1) if i else first for i in range(count)]


def shifted(sigmas: Sequence[float], shift: float) -> list[float]:
    """The sigmas, moved towards noise by a shift above 1: `shift s / (1 + (shift - 1) s)`."""
    return [shift * s / (1 + (shift - 1) * s) for s in sigmas]


def stretched(sigmas: Sequence[float], last: float) -> list[float]:
    """The sigmas, stretched from 1 so that they end at `last`; unchanged where there is nothing below 1 to stretch."""
    length = 1 - sigmas[-1]
    return [1 - (1 - s) * (1 - last) / length for s in sigmas] if length else list(sigmas)


def flow_sigmas(config: Any, count: int, given: Sequence[float], mu: float | None) -> Sequence[float]:
    """The sigmas of another grid than a student's own.

    Args:
        config: of the `RdmScheduler`.
        count: how many.
        given: by the caller; empty for none.
        mu: the resolution-dependent shift.

    Raises:
        ValueError: if `mu` is needed and missing.
    """
    own = config.student_sigmas
    return _shifted(config, count, given, mu) if own is None else _students(own, count, given, config)


def _students(own: Sequence[float], count: int, given: Sequence[float], config: Any) -> Sequence[float]:
    """As its exported scheduler has them: even ones stretched to the student's last, unless that is its first."""
    if given and (len(own) == 1 or not are_even(given)):
        return given
    last = own[-1] if len(own) > 1 else 1 / config.num_train_timesteps
    return linear_sigmas(own[0], last, count)


def _shifted(config: Any, count: int, given: Sequence[float], mu: float | None) -> Sequence[float]:
    """As `FlowMatchEulerDiscreteScheduler` has them, of this configuration."""
    shift = config.shift
    if config.use_dynamic_shifting:
        if mu is None:
            raise ValueError("use_dynamic_shifting needs mu; give it, or set use_dynamic_shifting to false.")
        shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
    laid = shifted(given or even_sigmas(count), shift)
    return stretched(laid, config.shift_terminal) if config.shift_terminal else laid


def check_grid(grid: Sequence[float], top: float, whole: bool) -> None:
    """Refuses a grid that cannot be sampled on.

    Args:
        grid: times.
        top: the noisiest.
        whole: whether times between whole numbers are unknown.

    Raises:
        ValueError: if it does not descend strictly between 0 and `top`, or has a fraction where there is none.
    """
    descends = all(earlier > later for earlier, later in pairwise(grid))
    if not (descends and all(0 <= time <= top for time in grid)):  # so said, NaN is refused, too
        raise ValueError(f"The grid {[float(t) for t in grid]} must descend strictly and lie between 0 and {top}.")
    if whole and any(time != int(time) for time in grid):
        raise ValueError(f"The grid {[float(t) for t in grid]} must be of whole timesteps.")


def check_request(count: int | None, timesteps: Sequence | None, sigmas: Sequence | None, is_flow: bool) -> None:
    """Refuses arguments of `set_timesteps` that contradict one another, where stock schedulers refuse them.

    Raises:
        ValueError: for both kinds of grid, sigmas that are not of flow matching, and a number beside a grid: of another
            length for flow matching, any for the rest.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("Both timesteps and sigmas are given; give one of them.")
    if sigmas is not None and not is_flow:
        raise ValueError("sigmas are of flow matching, and this student is not; give timesteps instead.")
    given = timesteps if timesteps is not None else sigmas
    if given is None or count is None:
        return
    if not is_flow or count != len(given):
        raise ValueError(
            f"num_inference_steps is {count}, and a grid of {len(given)} is given as well; give one of them."
        )
