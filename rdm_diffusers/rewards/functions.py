"""Rewards that Python gives as callables; a configuration names each as `python:name` or `python:name:weight`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .base import Reward
from .user_file import named, prepare

PYTHON = "python"
Function = Callable[..., Any]  # of images [B, 3, H, W] in [0, 1] and B prompts -> [B]
Functions = Mapping[str, Function]  # by name


def functions_by_name(functions: Function | Sequence[Function]) -> dict[str, Function]:
    """One or several functions or `Reward` objects, by name.

    The name is an attribute `name`, or else the function's `__name__`, or else that of its class.

    Raises:
        ValueError: one sentence, if one cannot be called or has no usable name, or if two have one name.
    """
    found: dict[str, Function] = {}
    for function in functions if isinstance(functions, list | tuple) else [functions]:
        if isinstance(function, type) or not callable(function):
            raise ValueError(
                f"reward_funcs holds {function!r}, which is no function of images and prompts; give a function or an "
                "instance with __call__, and name built-in rewards in the configuration's `reward`."
            )
        usual = getattr(function, "__name__", type(function).__name__)
        name = named(function, usual).name
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(
                f"reward_funcs holds a function with the name {name!r}; give it an attribute `name` of letters, "
                "digits, dots, hyphens and underscores."
            )
        if name in found:
            raise ValueError(f"reward_funcs holds two functions with the name {name}; give one another `name`.")
        found[name] = function
    return found


def with_functions(specs: Sequence[str], functions: Functions, weights: Sequence[float] | None) -> tuple[str, ...]:
    """A configuration's rewards, and behind them the functions that Python gives.

    Args:
        specs: the rewards that the configuration names. That of an earlier run names its functions, too.
        functions: by name.
        weights: one for each function. If None, a function has the weight that the configuration gives it, or 1.

    Raises:
        ValueError: one sentence, if there are not as many weights, or if the configuration names a function that is
            not given.
    """
    if weights is not None and len(weights) != len(functions):
        raise ValueError(f"reward_funcs has {len(functions)} functions, and reward_weights {len(weights)} weights; "
                         "give each function one weight.")  # fmt: skip
    texts = dict(split_function(spec) for spec in specs if is_function(spec))
    for name in texts:
        function_reward(name, functions)
    if weights is None:
        texts |= {name: None for name in functions if name not in texts}
    else:
        texts |= {name: str(float(weight)) for name, weight in zip(functions, weights, strict=True)}
    ours = (f"{PYTHON}:{name}" + ("" if text in (None, "1.0") else f":{text}") for name, text in texts.items())
    return (*(spec for spec in specs if not is_function(spec)), *ours)


def is_function(spec: str) -> bool:
    """Whether a specification names a function that Python gives."""
    return spec.startswith(f"{PYTHON}:")


def split_function(spec: str) -> tuple[str, str | None]:
    """`python:name:weight` as name and the text of the weight; None without one."""
    name, colon, weight = spec.removeprefix(f"{PYTHON}:").partition(":")
    return name, weight if colon else None


def function_reward(name: str, functions: Functions, device: torch.device | str | None = None) -> Reward:
    """The reward that a function is; a black box without an attribute `differentiable`.

    Args:
        name: of the function.
        functions: those that are given, by name.
        device: where a `torch.nn.Module` goes; it is also frozen, in evaluation mode. None leaves it as it is.

    Raises:
        ValueError: one sentence, if the function is not given, as on a command line.
    """
    if name not in functions:
        raise ValueError(
            f"The reward {name} is a function in Python; give it as Trainer(config, reward_funcs=[{name}]), or put it "
            f"into a file and name that, --reward path/to/file.py:{name}."
        )
    function = functions[name]
    return named(function if device is None else prepare(function, device), name)
