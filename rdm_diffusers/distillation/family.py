"""The members of the family by the name of `--algorithm`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .matching import Matching, ReverseKL
from .tdm import TrajectoryKL

MATCHINGS: dict[str, Callable[..., Matching]] = {
    "dmd": ReverseKL,
    "gndm": ReverseKL,
    "gndmr": ReverseKL,
    "snoopi": ReverseKL,
    "tdm": TrajectoryKL,
}


def settings_of(algorithm: str) -> list[str]:
    """The settings of a member, by the names of their flags."""
    member: Any = MATCHINGS[algorithm]
    return [field.name for field in fields(member)]
