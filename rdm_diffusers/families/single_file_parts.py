"""The networks in a single file: which there are, whether they are whole, and loaded by diffusers' own conversions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders.single_file import load_single_file_sub_model
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import LDM_VAE_KEYS, is_clip_model_in_single_file, is_t5_in_single_file
from diffusers.models.modeling_utils import no_init_weights
from safetensors.torch import load_file
from torch import Tensor, nn

from .base import Family
from .single_file import FLAG, SingleFile, predicts_v, read_tensors
from .weights import listed, networks_of, quiet

ABSENT = "absent"
TEXT_MARKS = ("text_model", "token_embedding", "t5xxl")  # in the names of text encoders' weights


def check_prediction(file: SingleFile, prediction_type: str) -> None:
    """Refuses a configuration of another prediction type than the one that a file is marked with. Raises ValueError."""
    if predicts_v(*read_tensors(file.path())) and prediction_type != "v_prediction":
        raise ValueError(
            f"{file.name} is marked as predicting v, and the scheduler of {file.config} is set for {prediction_type}; "
            f"give the folder or Hub id of a v-prediction pipeline with {FLAG}."
        )


def parts_of(file: SingleFile, index: Mapping[str, Any], family: Family, **hub_options: Any) -> list[str]:
    """The components whose weights are in a file, after a check of its header; the others are the configuration's.

    Args:
        file: the checkpoint.
        index: the `pipeline_config` of its configuration.
        family: the pipeline's.
        hub_options: as of `fetch`.

    Raises:
        ValueError: naming what does not fit, if a network is not whole, or is another than the configuration's.
    """
    path = file.path(**hub_options)
    stamp = path.stat().st_size, path.stat().st_mtime_ns
    networks = tuple(sorted(networks_of(index).items(), key=lambda entry: (entry[0] != family.denoiser_name, entry[0])))
    return list(_parts(file, path, stamp, file.folder(**hub_options), family.denoiser_name, networks))


@lru_cache(maxsize=8)
def _parts(
    file: SingleFile, path: Path, stamp: tuple[int, int], folder: Path, denoiser: str, networks: tuple
) -> tuple[str, ...]:
    """As `parts_of`, cached by the file's size and time."""
    tensors, _ = read_tensors(path)
    found = []
    for name, kind in networks:
        if not (name == denoiser or _has(kind, name, tensors)):
            continue
        try:
            is_ours = issubclass(kind, ModelMixin)
            problem = (
                network_problem(kind, name, tensors, folder) if is_ours else _text_problem(kind, name, path, folder)
            )
        except OSError as error:
            problem = f"has no configuration there ({str(error).splitlines()[0].rstrip('.')})"
        if problem == ABSENT:
            continue
        if problem:
            raise ValueError(
                f"{file.name} does not fit the configuration of {file.config}: its {name} {problem}; give the folder "
                f"or Hub id of a pipeline of the same kind with {FLAG}, or download the file again."
            )
        found.append(name)
    return tuple(found)


def _has(kind: type, name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file seems to hold a component beside the denoiser, by names that diffusers looks for."""
    if name == "vae":
        return any(key.startswith(tuple(LDM_VAE_KEYS)) for key in tensors)
    if kind.__name__.startswith("T5"):
        return is_t5_in_single_file(tensors)
    return is_clip_model_in_single_file(kind, tensors)


def network_problem(kind: Any, name: str, tensors: dict[str, Tensor], folder: Path) -> str | None:
    """What is wrong with the tensors of one of diffusers' networks, which may be on the meta device.

    Args:
        kind: the network's class.
        name: its component's, which is its folder's in `folder`.
        tensors: of the single file.
        folder: with the configuration.

    Returns:
        The end of a sentence; None if nothing is wrong.
    """
    config = kind.load_config(folder, subfolder=name)
    with torch.device("meta"), no_init_weights():
        wanted = kind.from_config(config).state_dict()
    given = tensors
    if not wanted.keys() <= tensors.keys():  # as diffusers asks itself
        mapped = next((each for each in kind.__mro__ if each.__name__ in SINGLE_FILE_LOADABLE_CLASSES), None)
        if mapped is None:
            return f"is a {kind.__name__}, which diffusers reads from no single file"
        try:
            with quiet():
                given = SINGLE_FILE_LOADABLE_CLASSES[mapped.__name__]["checkpoint_mapping_fn"](
                    checkpoint=dict(tensors), config=config
                )
        except Exception:  # diffusers' conversions raise anything for keys that they do not know
            return f"is not among its keys, or not whole, as far as a {kind.__name__} has them"
        others = given.keys() - wanted.keys()
        if others and given.keys() & wanted.keys():
            return f"has tensors that the configuration does not have, {listed(others)}"
    missing = wanted.keys() - given.keys()
    if missing:
        return "is not in the file" if missing == wanted.keys() else f"lacks {listed(missing)}"
    wrong = [key for key, tensor in wanted.items() if tensor.shape != given[key].shape]
    return f"has other shapes, in {listed(wrong)}" if wrong else None


def _text_problem(kind: Any, name: str, path: Path, folder: Path) -> str | None:
    """What is wrong with a text encoder; `ABSENT` if the file has none of its width.

    It is loaded in its own dtype, so that its weights are mapped from the disk, and not read.
    """
    tensors = load_file(path)
    own = (tensor.dtype for key, tensor in tensors.items() if any(mark in key for mark in TEXT_MARKS))
    dtype = next(own, torch.float32)
    try:
        encoder = _load(kind, name, tensors, folder, dtype)
    except ValueError as error:
        said = str(error)
        return ABSENT if "does not seem to contain" in said else f"does not fit ({said.splitlines()[0][:200]})"
    except KeyError as error:
        return f"lacks {error}"
    missing = [key for key, tensor in encoder.state_dict().items() if tensor.is_meta]
    return f"lacks {listed(missing)}" if missing else None


def rest_of(file: SingleFile, index: Mapping[str, Any], without: Collection[str], **hub_options: Any) -> str:
    """Where the rest of a single file's pipeline is loaded from: the configuration's Hub id or folder.

    If no network is left to load, it is a folder in any case, because diffusers refuses repositories without weights.
    Arguments as in `load_parts`; `without` are the components that are not loaded from there.
    """
    return file.config if networks_of(index).keys() - set(without) else str(file.folder(**hub_options))


def load_parts(
    file: SingleFile,
    index: Mapping[str, Any],
    names: Collection[str],
    dtype: torch.dtype,
    **hub_options: Any,
) -> dict[str, nn.Module]:
    """Networks from a single file, on the CPU, by component; call `parts_of` before, which checks them.

    Args:
        file: the checkpoint.
        index: the `pipeline_config` of its configuration.
        names: of components that are in the file.
        dtype: of the weights.
        hub_options: as of `fetch`.
    """
    tensors, folder, kinds = load_file(file.path(**hub_options)), file.folder(**hub_options), networks_of(index)
    return {name: _load(kinds[name], name, tensors, folder, dtype) for name in names}


def _load(kind: Any, name: str, tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> nn.Module:
    """One network; diffusers' conversions take tensors out of what they are given, so it is a copy."""
    with quiet():
        if issubclass(kind, ModelMixin):
            place = {"config": str(folder), "subfolder": name, "local_files_only": True}
            network: nn.Module = kind.from_single_file(dict(tensors), dtype=dtype, **place)
            return network
        library = kind.__module__.partition(".")[0]
        encoder: nn.Module = load_single_file_sub_model(
            library, kind.__name__, name, dict(tensors), None, False, str(folder), local_files_only=True,
            torch_dtype=dtype,
        )  # fmt: skip
        return encoder
