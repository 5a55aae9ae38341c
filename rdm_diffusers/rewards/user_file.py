"""Rewards from a user's own Python file. Loading one executes the file's code."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .base import Reward


@dataclass(frozen=True)
class NamedReward:
    """A user's callable with the two attributes of a reward; the answer is the callable's own, as is its graph."""

    function: Callable[[Tensor, Sequence[str]], Any]
    name: str
    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Any:
        """Images `[B, 3, H, W]` in [0, 1] and B prompts -> what the user's callable returns."""
        return self.function(images, prompts)


def load_from_file(path: str, attribute: str, device: torch.device | str) -> Reward:
    """A function, an instance, or a class without arguments (of which an instance is made) from a Python file.

    Without an attribute `differentiable` it is a black box; without `name` it is called as in the file. The file is
    **executed**, once per process.

    Args:
        path: of the file.
        attribute: the name in it.
        device: where a `torch.nn.Module` goes; it is also frozen, in evaluation mode.

    Raises:
        ValueError: one sentence, if the file is missing or fails, or has no such callable, or the class fails.
    """
    module = _execute(Path(path).expanduser())
    found = getattr(module, attribute, None)
    if not callable(found):
        known = ", ".join(_callables(module))
        advice = f"name one of {known}" if known else "define it as a function (images, prompts)"
        raise ValueError(f"{path} has no callable {attribute!r}; {advice}.")
    function = prepare(_instance(found, f"{attribute} in {path}") if isinstance(found, type) else found, device)
    if not callable(function):
        raise ValueError(
            f"Instances of {attribute} in {path} cannot be called; give it __call__(self, images, prompts)."
        )
    return named(function, attribute)


def named(function: Callable[[Tensor, Sequence[str]], Any], usual: str) -> NamedReward:
    """A callable with its attributes `name` and `differentiable`, by default the `usual` name and False."""
    name = getattr(function, "name", usual)
    differentiable = bool(getattr(function, "differentiable", False))
    return NamedReward(function, name if isinstance(name, str) else usual, differentiable)


def prepare(reward: Any, device: torch.device | str) -> Any:
    """A module on the device, frozen and in evaluation mode; anything else as it is."""
    return reward.to(device).eval().requires_grad_(False) if isinstance(reward, nn.Module) else reward


def reason(error: BaseException) -> str:
    """An exception in one line, for the middle of a sentence."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".: ")


def _instance(found: type, name: str) -> Any:
    try:
        return found()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also sys.exit, which would end the run as if it had finished
        raise ValueError(
            f"The class {name} could not be made without arguments ({reason(error)}); fix it, or name an instance."
        ) from error


def _execute(path: Path) -> ModuleType:
    """The file as a module, executed when it is first asked for."""
    if not path.is_file():
        raise ValueError(f"The reward file {path} does not exist; give the path of a Python file.")
    name = _module_name(path.resolve())
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    sys.modules[name] = module = module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also sys.exit, which would end the run as if it had finished
        del sys.modules[name]
        raise ValueError(f"The reward file {path} fails when it is imported ({reason(error)}); fix it.") from error
    return module


def _module_name(path: Path) -> str:
    """A name for each file alone, in a package for each folder, so that `from .beside import` finds what lies there."""
    package, file = (hashlib.sha256(str(each).encode()).hexdigest()[:16] for each in (path.parent, path))
    name = f"rdm_rewards_{package}"
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(path.parent)]
    stem = re.sub(r"\W", "_", path.stem)
    return f"{name}.{stem}_{file}"


def _callables(module: ModuleType) -> list[str]:
    """The public callables that a file defines; not the functions and classes that it imports."""

    def foreign(value: Any) -> bool:
        return (inspect.isclass(value) or inspect.isroutine(value)) and value.__module__ != module.__name__

    return [
        name for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and not foreign(value)
    ]  # fmt: skip
