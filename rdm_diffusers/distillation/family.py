"""The members of the family by the name of `--algorithm`, and the outsider beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .lcm import LCM
from .matching import Matching, ReverseKL

MATCHINGS: dict[str, Callable[..., Matching]] = {
    "dmd": ReverseKL,
    "gndm": ReverseKL,
    "gndmr": ReverseKL,
}


# All algorithms; those that are no matchings need no fake score.
ALGORITHMS: dict[str, Callable[..., Any]] = {**MATCHINGS, "lcm": LCM}


def settings_of(algorithm: str) -> list[str]:
    """The settings of an algorithm, by the names of their flags."""
    member: Any = ALGORITHMS[algorithm]
    return [field.name for field in fields(member)]
