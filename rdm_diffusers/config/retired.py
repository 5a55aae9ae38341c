"""Flags of release 0.1.0 that its own measurements retired; docs/evidence.md says what they brought."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Each with the value under which it did nothing; None where another flag decided whether it did.
RETIRED: dict[str, Any] = {
    "debias_pool": 1, "black_box_form": "tilt", "num_perturbations": None, "perturbation_scale": None,
}  # fmt: skip
JAMES_STEIN = "james_stein"  # a value of gndm_lambda


class RetiredError(ValueError):
    """A run was made with an option that this release does not have; the message says which one has it."""


def retirement(flag: str) -> str:
    """What a sentence says of a retired flag."""
    return f"{flag} was retired after release 0.1.0 (docs/method.md says why); leave it out, or use that release."


def without_retired(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A run's recorded arguments without those of retired flags that did nothing; RetiredError if one did something."""
    for name, idle in RETIRED.items():
        if idle is not None and arguments.get(name, idle) != idle:
            raise RetiredError(retirement(f"--{name} {arguments[name]}, with which the run was made,"))
    if arguments.get("gndm_lambda") == JAMES_STEIN:
        raise RetiredError(retirement(f"--gndm_lambda {JAMES_STEIN}, with which the run was made,"))
    return {name: value for name, value in arguments.items() if name not in RETIRED}
