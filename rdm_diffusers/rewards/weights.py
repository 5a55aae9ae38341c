"""Finds and loads the weights and tokenizers of reward models: safetensors, or .pt files that hold only tensors.

Every function raises ValueError, one sentence on what is missing or wrong; `reward` is the reward's name, for it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .user_file import reason

SAFETENSORS, PICKLED = ".safetensors", (".pt", ".pth", ".bin", ".ckpt")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


def local_path(reward: str, place: str) -> Path | None:
    """A path on this machine; None if it is the id of a Hub repository, `owner/name`."""
    path = Path(place).expanduser()
    if path.exists():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", place) and not place.startswith((".", "~")) and not path.suffix:
        return None
    raise ValueError(f"The weights {place} of the reward {reward} do not exist; give a file, a folder or a Hub id.")


def hub_file(reward: str, repository: str, file: str) -> Path:
    """A file of the Hub, from the cache or downloaded."""
    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The reward {reward} could not get {file} of {repository} from the Hub ({reason(error)}); connect to the "
            f"network, or download it elsewhere and name it: --reward {reward}=/path/to/{file}."
        ) from error


def published_file(reward: str, path: str | None, repository: str, file: str, names: Sequence[str]) -> Path:
    """The published file: from the Hub if `path` is None, else that path, or a file `names` in that folder."""
    if path is None:
        return hub_file(reward, repository, file)
    place = local_path(reward, path)
    if place is None:
        raise ValueError(f"The reward {reward} takes no Hub id such as {path}; give its file, or a folder.")
    return file_in(reward, place, names)


def file_in(reward: str, place: Path, names: Sequence[str]) -> Path:
    """The file itself, or the first of these names that a folder holds."""
    found = [place] if place.is_file() else [place / name for name in names if (place / name).is_file()]
    if not found:
        raise ValueError(f"The folder {place} holds no weights of the reward {reward}; put {' or '.join(names)} there.")
    return found[0]


def read_tensors(reward: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a file on the CPU, by name; nothing in it is executed.

    A surrounding `state_dict` and the prefix `module.` of training scripts are removed.
    """
    if path.suffix not in (SAFETENSORS, *PICKLED):
        known = ", ".join((SAFETENSORS, *PICKLED))
        raise ValueError(f"The weights {path} of the reward {reward} are no file of weights; give one of {known}.")
    try:
        content = load_file(path) if path.suffix == SAFETENSORS else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"The weights {path} of the reward {reward} cannot be read ({reason(error)}); they are damaged, or hold "
            "more than tensors, which is never unpickled: download them again, or save the tensors as safetensors."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"The weights {path} of the reward {reward} hold no table of tensors; give its own file.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def load_head(reward: str, path: Path, head: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads tensors into a head, whose names and shapes they must have."""
    _check_tensors(reward, path, head, tensors)
    head.load_state_dict(tensors)


def load_model(reward: str, cls: type, place: Path | str, dtype: torch.dtype) -> Any:
    """A model from a folder that transformers saved, or from the Hub; no weight may be missing."""
    try:
        model, info = cls.from_pretrained(place, dtype=dtype, output_loading_info=True)  # type: ignore[attr-defined]
    except Exception as error:  # of many kinds: no network, no such file, a file of another kind
        raise ValueError(
            f"The model {place} of the reward {reward} could not be loaded ({reason(error)}); connect to the network, "
            f"or name a folder that holds config.json and its weights: --reward {reward}=/path/to/folder."
        ) from error
    wrong = sorted(info["missing_keys"]) + sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if wrong:
        raise ValueError(
            f"The weights {place} are not those of the reward {reward} (missing or of another shape: "
            f"{', '.join(wrong[:3])}); give its own folder."
        )
    return model


def model_from_tensors(
    reward: str, cls: type, config: Any, tensors: dict[str, Tensor], place: Path, dtype: torch.dtype, **options: Any
) -> Any:
    """A transformers model of a configuration, with these weights, whose names and shapes must be the model's."""
    with torch.device("meta"):
        _check_tensors(reward, place, cls(config, **options), tensors)
    return cls.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **options)  # type: ignore[attr-defined]


def load_tokenizer(reward: str, cls: type, place: Path | None, default: str, vocab_size: int) -> Any:
    """The tokenizer beside the weights at `place` (None for the Hub) if there is one, else the Hub's `default`."""
    folder = place if place is None or place.is_dir() else place.parent
    beside = folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES)
    source = folder if beside else default
    try:
        tokenizer = cls.from_pretrained(source)  # type: ignore[attr-defined]
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ValueError("it has no words")  # transformers 5 gives an empty one where it finds no files
    except Exception as error:  # of many kinds: no network, no such file, a file of another kind
        raise ValueError(
            f"The reward {reward} needs the tokenizer of {default}, which could not be loaded from {source} "
            f"({reason(error)}); connect to the network, or put its files ({' or '.join(TOKENIZER_FILES)}) beside "
            "the weights."
        ) from error
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer of {source} has {len(tokenizer)} tokens, the reward {reward} knows {vocab_size}; put its "
            "own tokenizer beside the weights."
        )
    return tokenizer


def _check_tensors(reward: str, path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Names some tensors that are missing, unknown, or of another shape than the model's."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": [n for n in sorted(expected.keys() & found.keys()) if expected[n] != found[n]],
    }
    named = {kind: ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
             for kind, names in faults.items() if names}  # fmt: skip
    if named:
        listed = "; ".join(f"{kind}: {names}" for kind, names in named.items())
        raise ValueError(f"The weights {path} are not those of the reward {reward} ({listed}); give its own file.")
