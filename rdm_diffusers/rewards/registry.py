"""Turns what stands behind `--reward` into a reward and its weight."""

from __future__ import annotations

import math
from importlib import import_module

import torch

from .base import Reward, WeightedReward
from .user_file import instantiated, load_from_file, prepared

FORMS = "name, name:weight, path/to/file.py:function or path/to/file.py:function:weight"

# Imported when they are used, so that a reward's own needs are nobody else's.
REWARDS: dict[str, str] = {
    "tiny_prompt": "rdm_diffusers.tiny.rewards:PromptFaithfulness",
    "tiny_prompt_black_box": "rdm_diffusers.tiny.rewards:BlackBoxPromptFaithfulness",
    "tiny_bold": "rdm_diffusers.tiny.rewards:Boldness",
    "tiny_thin": "rdm_diffusers.tiny.rewards:Thinness",
}


def load_reward(spec: str, device: torch.device | str) -> WeightedReward:
    """The reward that a specification names.

    Args:
        spec: `name`, `name:weight`, `path/to/file.py:function` or `path/to/file.py:function:weight`; the weight is 1
            by default. **A file is executed**: name only files that you trust.
        device: where a reward that is a `torch.nn.Module` goes; it is also frozen, in evaluation mode.

    Raises:
        ValueError: one sentence on what is wrong and what to do.
    """
    place, function, weight = _parse(spec)
    reward = _built_in(place, device) if function is None else load_from_file(place, function, device)
    return WeightedReward(reward, weight)


def _parse(spec: str) -> tuple[str, str | None, float]:
    """Name or path, the function in the file (None for a name), and the weight."""
    place, *rest = spec.split(":")
    if any(part.endswith(".py") for part in rest):
        raise ValueError(f"The path in --reward {spec!r} contains a colon, which separates path, function and weight; "
                         "move or rename the file.")  # fmt: skip
    in_file = place.endswith(".py")
    if in_file and not (rest and rest[0]):
        raise ValueError(f"--reward {spec!r} names a file but no function; write {place}:function.")
    if len(rest) > 1 + in_file:
        raise ValueError(f"--reward {spec!r} has too many colons; write {FORMS}.")
    function = rest.pop(0) if in_file else None
    return place, function, _weight(spec, rest[0]) if rest else 1.0


def _weight(spec: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise ValueError(f"The weight {text!r} in --reward {spec!r} is not a number; write {FORMS}.") from None
    if weight == 0 or not math.isfinite(weight):
        raise ValueError(
            f"The weight in --reward {spec!r} must be finite and not 0; leave the reward out, or give it a weight such "
            "as 1, or -1 to punish."
        )
    return weight


def _built_in(name: str, device: torch.device | str) -> Reward:
    if name not in REWARDS:
        raise ValueError(f"There is no reward {name!r}; use {', '.join(REWARDS)}, or path/to/file.py:function.")
    module, attribute = REWARDS[name].split(":")
    return prepared(instantiated(getattr(import_module(module), attribute), name), device)
