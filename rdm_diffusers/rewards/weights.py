"""Finds and reads the weights of reward models: safetensors, or published .pt files that hold only tensors."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .user_file import reason

SAFETENSORS, PICKLED = (".safetensors",), (".pt", ".pth", ".bin", ".ckpt")


def local_path(reward: str, place: str) -> Path | None:
    """A path on this machine; None if it is the id of a Hub repository, `owner/name`.

    Raises:
        ValueError: if it is neither.
    """
    path = Path(place).expanduser()
    if path.exists():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", place) and not place.startswith((".", "~")) and not path.suffix:
        return None
    raise ValueError(f"The weights {place} of the reward {reward} do not exist; give a file, a folder or a Hub id.")


def hub_file(reward: str, repository: str, file: str) -> Path:
    """A file of the Hub, from the cache or downloaded.

    Raises:
        ValueError: if it cannot be downloaded, naming the flag for a local copy.
    """
    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The reward {reward} could not get {file} of {repository} from the Hub ({reason(error)}); connect to the "
            f"network, or download it elsewhere and name it: --reward {reward}=/path/to/{file}."
        ) from error


def published_file(reward: str, path: str | None, repository: str, file: str, names: Iterable[str]) -> Path:
    """The published file of a reward: from the Hub if `path` is None, else that path, or a file `names` in that folder.

    Raises:
        ValueError: if it does not exist, or if the path is a Hub id.
    """
    if path is None:
        return hub_file(reward, repository, file)
    place = local_path(reward, path)
    if place is None:
        raise ValueError(f"The reward {reward} takes no Hub id such as {path}; give its file, or a folder.")
    return file_in(reward, place, names)


def file_in(reward: str, place: Path, names: Iterable[str]) -> Path:
    """The file itself, or the first of these names that a folder holds.

    Raises:
        ValueError: if the folder holds none of them.
    """
    if place.is_file():
        return place
    names = tuple(names)
    for name in names:
        if (place / name).is_file():
            return place / name
    raise ValueError(f"The folder {place} holds no weights of the reward {reward}; put {' or '.join(names)} there.")


def read_tensors(reward: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a file on the CPU, by name; nothing in it is executed.

    A surrounding `state_dict` and the prefix `module.` of training scripts are removed.

    Raises:
        ValueError: if the file is of another kind, damaged, or holds more than tensors.
    """
    if path.suffix not in SAFETENSORS + PICKLED:
        known = ", ".join(SAFETENSORS + PICKLED)
        raise ValueError(f"The weights {path} of the reward {reward} are no file of weights; give one of {known}.")
    try:
        content = load_file(path) if path.suffix in SAFETENSORS else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"The weights {path} of the reward {reward} cannot be read ({reason(error)}); they are damaged, or hold "
            "more than tensors, which is never unpickled: download them again, or save the tensors as safetensors."
        ) from error
    return _named_tensors(reward, path, content)


def load_head(reward: str, path: Path, head: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads tensors into a head; ValueError as `check_tensors`."""
    check_tensors(reward, path, head, tensors)
    head.load_state_dict(tensors)


def check_tensors(reward: str, path: Path | str, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Compares names and shapes with a model's.

    Raises:
        ValueError: naming some tensors that are missing, unknown, or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": [n for n in sorted(expected.keys() & found.keys()) if expected[n] != found[n]],
    }
    said = "; ".join(f"{kind}: {_some(names)}" for kind, names in faults.items() if names)
    if said:
        raise ValueError(f"The weights {path} are not those of the reward {reward} ({said}); give its own file.")


def _named_tensors(reward: str, path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"The weights {path} of the reward {reward} hold no table of tensors; give its own file.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
