"""The members of the family by the name of `--algorithm`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .f_distill import FDistill
from .matching import Matching, ReverseKL
from .sid import ScoreIdentity
from .sim import ScoreImplicit
from .uni_instruct import UniInstruct

MATCHINGS: dict[str, Callable[..., Matching]] = {
    "dmd": ReverseKL,
    "gndm": ReverseKL,
    "gndmr": ReverseKL,
    "dmd2": ReverseKL,  # and its adversarial branch
    "f_distill": FDistill,
    "uni_instruct": UniInstruct,
    "sid": ScoreIdentity,
    "sim": ScoreImplicit,
}
THROUGH_NETWORKS = ("sid", "sim")  # those with gradients through the teacher and the fake score


def settings_of(algorithm: str) -> list[str]:
    """The settings of a member, by the names of their flags."""
    member: Any = MATCHINGS[algorithm]
    return [field.name for field in fields(member)]
