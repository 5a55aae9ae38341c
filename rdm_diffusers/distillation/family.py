"""The members of the family by the name of `--algorithm`, and the outsider beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .f_distill import FDistill
from .lcm import LCM
from .matching import Matching, ReverseKL
from .sid import ScoreIdentity
from .sim import ScoreImplicit
from .tdm import TrajectoryKL
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
    "snoopi": ReverseKL,
    "tdm": TrajectoryKL,
}
THROUGH_NETWORKS = ("sid", "sim", "uni_instruct")  # those with gradients through the teacher and the fake score
# All algorithms; those that are no matchings need no fake score.
ALGORITHMS: dict[str, Callable[..., Any]] = {**MATCHINGS, "lcm": LCM}


def settings_of(algorithm: str) -> list[str]:
    """The settings of an algorithm, by the names of their flags."""
    member: Any = ALGORITHMS[algorithm]
    return [field.name for field in fields(member)]
