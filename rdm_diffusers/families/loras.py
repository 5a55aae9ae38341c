"""LoRAs from files and from the Hub: found, checked by their headers, and added to a pipeline's weights."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..adapters import lora_layers
from ..folders import digest_of_file
from ..untrusted import described, parse_object
from .base import LORA_FILE, Family
from .hub_files import fetch, repository_files
from .weights import PICKLED, SAFE, quiet

FORM = "PATH_OR_ID or PATH_OR_ID:scale"
# peft and diffusers read names as regular expressions; one of this kind matches little, and quickly.
NAME = re.compile(r"\^?[A-Za-z0-9_.\-]{1,400}\$?")
DOWN = re.compile(r"(lora_A(\.\w+)?|lora_down|lora\.down)\.weight$")
OTHER_KINDS = {
    re.compile(r"dora_scale|lora_magnitude_vector"): "a DoRA", re.compile(r"\bhada_"): "a LoHa",
    re.compile(r"\blokr_"): "a LoKr", re.compile(r"lora_(B|up)(\.\w+)?\.bias$"): "a LoRA with biases",
    re.compile(r"\.diff(_b)?$"): "a LoRA with whole weights", re.compile(r"lora_mid"): "a LoCon in Tucker form",
}  # fmt: skip
# Entries of an adapter's description that only size and place its matrices, or do nothing after its training.
USUAL = {
    "r", "lora_alpha", "target_modules", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "task_type",
    "base_model_name_or_path", "revision", "peft_version", "inference_mode",
}  # fmt: skip
ADAPTER = "lora"  # the name that a LoRA has while it is read
PATTERNS = ("target_modules", "rank_pattern", "alpha_pattern")
LoraLayers = dict[str, tuple[Tensor, Tensor]]  # a network's layers by name: A `[r, in, ...]`, and B `[out, r, ...]`


@dataclass(frozen=True)
class Lora:
    """A LoRA and its scale.

    Args:
        name: a file, a folder, `user/repository`, or `user/repository/file.safetensors` on the Hub.
        scale: what its part of the weights is multiplied by.
    """

    name: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """From `name` or `name:scale`, with a local name's full path. Raises ValueError for a scale that is none."""
        name, colon, scale = text.rpartition(":")
        if not colon or Path(text).exists():
            name, scale = text, "1"
        try:
            number = float(scale)
        except ValueError:
            number = math.nan
        if not name or not math.isfinite(number) or number == 0:
            raise ValueError(f"The scale {scale!r} in {text!r} must be a finite number other than 0; write {FORM}.")
        return cls(os.path.abspath(name) if Path(name).exists() else name, number)  # files in the cache are links

    def __str__(self) -> str:
        return self.name if self.scale == 1 else f"{self.name}:{self.scale:g}"

    @property
    def is_local(self) -> bool:
        """Whether it is a file or folder of this machine."""
        return Path(self.name).exists()

    @property
    def place(self) -> tuple[str, str]:
        """The folder or repository that it is in, and the file's path there; an empty one if the name has none."""
        if self.is_local:
            path = Path(self.name)
            return (str(path.parent), path.name) if path.is_file() else (self.name, "")
        parts = self.name.split("/")
        return "/".join(parts[:2]), "/".join(parts[2:])

    def file(self, **hub_options: Any) -> Path:
        """Its file, downloaded with options of `fetch` if it is on the Hub, with a checked header.

        Raises:
            ValueError: one sentence, if there is none, or one with which peft would do more than add a LoRA.
        """
        path = _local(*self.place) if self.is_local else _downloaded(self.name, *self.place, **hub_options)
        check_header(path)
        return path

    def exact(self) -> Lora:
        """The same LoRA under a name that includes its file's."""
        place, file = self.place
        return replace(self, name=f"{place}/{file or self.file().name}")

    def digest(self) -> str:
        """SHA-256 of its file."""
        return digest_of_file(self.file())


def _local(folder: str, file: str) -> Path:
    files = [file] if file else [each.name for each in Path(folder).iterdir() if each.is_file()]
    return Path(folder) / _chosen(folder, files)


def _downloaded(name: str, repository: str, file: str, **hub_options: Any) -> Path:
    if name.startswith((".", "/", "~")) or "/" not in name or repository.endswith((SAFE, *PICKLED)):
        raise ValueError(f"The LoRA {name} does not exist; check the path, or give a Hub id.")
    files = [file] if file else [each for each in repository_files(repository, **hub_options) if "/" not in each]
    return fetch("LoRA", repository, _chosen(repository, files or [LORA_FILE]), **hub_options)  # perhaps in the cache


def _chosen(name: str, files: Sequence[str]) -> str:
    """The LoRA's file among those of a folder; ValueError if there is none, or several."""
    safe = sorted(file for file in files if file.endswith(SAFE))
    if LORA_FILE in safe or len(safe) == 1:
        return LORA_FILE if LORA_FILE in safe else safe[0]
    if safe:
        raise ValueError(f"{name} holds {len(safe)} files of weights; name one, for example {name}/{safe[0]}.")
    if any(file.endswith(PICKLED) for file in files):
        raise ValueError(
            f"The LoRA {name} has only pickled weights, which can run code and are refused; give a safetensors file."
        )
    raise ValueError(f"{name} holds no LoRA; give a safetensors file, or a folder or Hub id with one.")


def rank_of(name: str) -> int:
    """The highest rank in a LoRA's file, by its header. Raises ValueError as `Lora.file`."""
    return max(max(shape[:1], default=1) for shape in _downs(Lora.parse(name).file()).values())


def _downs(path: Path) -> dict[str, list[int]]:
    """The shapes of the first matrices of a LoRA's file, by name."""
    with safe_open(path, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys() if DOWN.search(name)}  # noqa: SIM118


def check_header(path: Path) -> None:
    """Refuses a file that is no plain LoRA, or that asks peft for more than its matrices. Raises ValueError."""
    try:
        with safe_open(path, "pt") as file:
            names, header = list(file.keys()), (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}")
        adapter = parse_object(header)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"The LoRA {path} is damaged ({described(error)}); download it again.") from error
    for name in names:
        kind = next((kind for mark, kind in OTHER_KINDS.items() if mark.search(name)), None)
        if kind:
            raise ValueError(f"{path} is {kind}, which cannot be used here; give a plain LoRA.")
        if not NAME.fullmatch(name):
            raise ValueError(f"The LoRA {path} holds {name[:80]!r}, which is no name of a weight; use another file.")
    if not any(DOWN.search(name) for name in names):
        raise ValueError(f"{path} holds no LoRA; give the file of one.")
    _check_description(path, adapter)


def _check_description(path: Path, adapter: Mapping[str, Any]) -> None:
    """Refuses entries of a `LoraConfig` that are more than ranks, alphas and names of layers."""
    from peft import LoraConfig  # slow to import

    defaults = LoraConfig().to_dict()
    for key, value in adapter.items():
        entry = key.rpartition(".")[2]
        unset = value is None or value is False or value in ([], {}, "", "gaussian") or value == defaults.get(entry)
        if entry not in USUAL and not unset:
            raise ValueError(f"The LoRA {path} sets {entry[:40]!r}, which is more than a plain LoRA; use another file.")
        if entry in PATTERNS and not (
            isinstance(value, list | dict) and all(isinstance(each, str) and NAME.fullmatch(each) for each in value)
        ):
            raise ValueError(f"The LoRA {path} has no list of layers' names in its {entry}; use another file.")


def read_lora(pipeline: DiffusionPipeline, lora: Lora) -> dict[str, LoraLayers]:
    """What a LoRA adds to each network of a stock pipeline, which is as before afterwards.

    Args:
        pipeline: its networks may be on the meta device; then so are the matrices.
        lora: its scale is multiplied into B.

    Raises:
        ValueError: if it does not fit these networks as a whole.
    """
    layers = _load(pipeline, lora)
    with quiet():
        pipeline.unload_lora_weights()
    return layers


def fuse_loras(pipeline: DiffusionPipeline, family: Family, loras: Sequence[Lora], **hub_options: Any) -> LoraLayers:
    """Adds LoRAs to the weights of a pipeline's networks, its text encoders included.

    Args:
        pipeline: changed in place; it has no adapters afterwards.
        family: the pipeline's.
        loras: added one after another.
        hub_options: as of `fetch`.

    Returns:
        What was added to the denoiser: of each layer the matrices of all LoRAs, side by side.

    Raises:
        ValueError: as `read_lora`.
    """
    joined: LoraLayers = {}
    for lora in loras:
        for name, (down, up) in _load(pipeline, lora, **hub_options).get(family.denoiser_name, {}).items():
            if name in joined:
                down, up = torch.cat([joined[name][0], down]), torch.cat([joined[name][1], up], dim=1)
            joined[name] = down, up
        with quiet():
            pipeline.fuse_lora(adapter_names=[ADAPTER])
            pipeline.unload_lora_weights()
    return joined


def _load(pipeline: DiffusionPipeline, lora: Lora, **hub_options: Any) -> dict[str, LoraLayers]:
    """Loads a LoRA as an adapter at its scale; its matrices by component."""
    path = lora.file(**hub_options)
    place: dict[str, Any] = {"weight_name": path.name, "use_safetensors": True, "local_files_only": True}
    try:
        with quiet():
            pipeline.load_lora_weights(str(path.parent), adapter_name=ADAPTER, **place)
            pipeline.set_adapters([ADAPTER], [lora.scale])
    except Exception as error:  # diffusers and peft raise anything for layers that are not there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise _unfit(pipeline, lora, reason[:200]) from error
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    layers = {name: layers_of(part) for name, part in networks.items()}
    lost = len(_downs(path)) - sum(map(len, layers.values()))
    if lost > 0:
        raise _unfit(pipeline, lora, f"{lost} of its layers are not there")
    return {name: each for name, each in layers.items() if each}


def _unfit(pipeline: DiffusionPipeline, lora: Lora, reason: str) -> ValueError:
    return ValueError(
        f"The LoRA {lora.name} does not fit this {type(pipeline).__name__} ({reason}); give one that was made for the "
        "same base model."
    )


def layers_of(network: nn.Module, adapter: str = ADAPTER) -> LoraLayers:
    """Copies of an adapter's matrices, with its scale multiplied into B, which is float32."""
    adapted = {name: each for name, each in lora_layers(network).items() if adapter in each.lora_A}
    return {
        name: (
            layer.lora_A[adapter].weight.detach().clone(),
            layer.lora_B[adapter].weight.detach().float() * layer.scaling[adapter],
        )
        for name, layer in adapted.items()
    }


@torch.no_grad()
def add_layers(network: nn.Module, layers: LoraLayers) -> None:
    """Adds B A to the weights of a network's layers, in place."""
    for name, (down, up) in layers.items():
        weight = network.get_submodule(name).get_parameter("weight")
        weight.add_((up.float().flatten(1) @ down.float().flatten(1)).view_as(weight))
