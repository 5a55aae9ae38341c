"""Turns the values of `--reward` into rewards and their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from types import MappingProxyType

import torch

from .base import Reward, WeightedReward
from .functions import Functions, function_reward, is_function, split_function
from .served import is_address, load_served, split_address
from .user_file import load_from_file, prepare

FORMS = (
    "name, name:weight, name=weights:weight, path/to/file.py:function, path/to/file.py:function:weight, "
    "http://host:port/path or http://host:port/path:weight"
)

# Imported when they are used, so that a reward's own needs are nobody else's.
TINY_REWARDS: dict[str, str] = {
    "tiny_prompt": "rdm_diffusers.tiny.rewards:PromptFaithfulness",
    "tiny_prompt_black_box": "rdm_diffusers.tiny.rewards:BlackBoxPromptFaithfulness",
    "tiny_bold": "rdm_diffusers.tiny.rewards:Boldness",
    "tiny_thin": "rdm_diffusers.tiny.rewards:Thinness",
}
PRETRAINED_REWARDS: dict[str, str] = {  # functions of the weights' path and dtype
    "hpsv2": "rdm_diffusers.rewards.clip_rewards:load_hpsv2_1",
    "hpsv2.0": "rdm_diffusers.rewards.clip_rewards:load_hpsv2_0",
    "hpsv2.1": "rdm_diffusers.rewards.clip_rewards:load_hpsv2_1",
    "hpsv3": "rdm_diffusers.rewards.hpsv3:load",
    "pickscore": "rdm_diffusers.rewards.clip_rewards:load_pickscore",
    "clip_score": "rdm_diffusers.rewards.clip_rewards:load_clip_score",
    "image_reward": "rdm_diffusers.rewards.image_reward:load",
    "aesthetic": "rdm_diffusers.rewards.clip_rewards:load_aesthetic",
}
REWARDS: dict[str, str] = TINY_REWARDS | PRETRAINED_REWARDS | {"ocr": "rdm_diffusers.rewards.ocr:TextReward"}


def load_distinct_rewards(
    specs: Sequence[str],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    functions: Functions = MappingProxyType({}),
) -> dict[str, WeightedReward]:
    """Rewards by their specifications, each from `load_reward`. Raises ValueError, too, if two have one name."""
    rewards = {spec: load_reward(spec, device, dtype, functions) for spec in specs}
    if len({weighted.reward.name for weighted in rewards.values()}) < len(specs):
        raise ValueError(f"Two of the rewards {', '.join(specs)} have one name; name each once.")
    return rewards


def load_reward(
    spec: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    functions: Functions = MappingProxyType({}),
) -> WeightedReward:
    """The reward that a specification names.

    Args:
        spec: `name`, `name=path` for weights of one's own, `path/to/file.py:function`, or `http://host:port/path` of a
            server, and behind each of them `:weight`, 1 by default. **A Python file is executed**: name only files that
            you trust. Weights are not: they are safetensors, or files of tensors that are never unpickled.
        device: where a reward that is a `torch.nn.Module` goes; it is also frozen, in evaluation mode.
        dtype: of the weights of pretrained rewards; the others have their own.
        functions: those that `python:name` names.

    Raises:
        ValueError: one sentence on what is wrong and what to do.
    """
    if is_address(spec) or is_function(spec):
        place, text = split_address(spec) if is_address(spec) else split_function(spec)
        weight = 1.0 if text is None else _weight(spec, text)
        reward = load_served(place) if is_address(spec) else function_reward(place, functions, device)
        return WeightedReward(reward, weight)
    place, function, weight = _parse(spec)
    reward = _built_in(place, device, dtype) if function is None else load_from_file(place, function, device)
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


def _built_in(place: str, device: torch.device | str, dtype: torch.dtype) -> Reward:
    """A reward of the table; `place` is its name, perhaps with `=path`."""
    name, equals, path = place.partition("=")
    if name not in REWARDS:
        raise ValueError(
            f"There is no reward {name!r}; use {', '.join(REWARDS)}, path/to/file.py:function, or http://host:port/path."
        )
    if equals and not path:
        raise ValueError(f"--reward {place!r} names no weights behind the =; write {name}=/path/to/weights, or {name}.")
    if equals and name not in PRETRAINED_REWARDS:
        raise ValueError(f"The reward {name} has no weights to choose; leave ={path} out.")
    module, attribute = REWARDS[name].split(":")
    make = getattr(import_module(module), attribute)
    return prepare(make(path or None, dtype) if name in PRETRAINED_REWARDS else make(), device)
