"""Checkpoints of a single file, as ComfyUI, kohya's tools and AUTOMATIC1111 have them: where each is, and of what kind.

Such a file has weights only. The configurations of its networks, its scheduler and its tokenizers are those of a
pipeline in a folder or on the Hub, which diffusers' `from_single_file` calls its `config`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    CHECKPOINT_KEY_NAMES,
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    infer_diffusers_model_type,
)
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..folders import digest_of_file
from ..tiny import is_tiny, resolve_teacher
from ..untrusted import described
from .hub_files import explain_hub_errors, fetch
from .weights import PICKLED, SAFE

FLAG = "--single_file_config"
CONFIGURATIONS = ["*.json", "*/*.json", "*.txt", "*/*.txt", "*/*.model", "*/*.jinja"]
# The kinds of which all releases have one configuration, or nearly: by diffusers' names for them.
KNOWN_KINDS = ("v1", "xl_base", "sd3", "sd35_medium", "sd35_large", "flux-dev", "flux-schnell")
LORA_KEY = re.compile(r"\.(lora_(A|B|up|down)|lora\.(up|down)|alpha$|hada_|lokr_)")
QUANTISED = re.compile(r"scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|absmax|quant_state|comfy_quant")
INTEGERS = (torch.uint8, torch.int8)  # dtypes of quantised weights
V_PREDICTION = ("v_pred", "v", "v_prediction")  # a key, or ModelSpec's prediction types
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I32": torch.int32, "U8": torch.uint8,
    "I8": torch.int8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint of one file and the pipeline whose configuration it has; make one with `SingleFile.of`.

    Args:
        name: a local safetensors file, or `owner/repository/file.safetensors` on the Hub.
        config: the folder or Hub id of a pipeline with the same networks, or the name of an embedded teacher.
    """

    name: str
    config: str

    @classmethod
    def of(cls, name: str, config: str | None = None, **hub_options: Any) -> SingleFile | None:
        """The file of this name; None if the name is that of a folder, of a Hub repository or of an embedded teacher.

        Args:
            name: of a teacher.
            config: as above; by default the file's keys say which pipeline it is of, as far as they can.
            hub_options: as of `find`.

        Raises:
            ValueError: if the file is missing or damaged, no checkpoint, or of an unknown kind.
        """
        if not is_single_file(name):
            return None
        return cls(name, config or default_config(name, read_tensors(find(name, **hub_options))[0]))

    @property
    def repository(self) -> str | None:
        """The Hub repository that has the file; None for a local file."""
        return None if Path(self.name).exists() else "/".join(self.name.split("/")[:2])

    def path(self, **hub_options: Any) -> Path:
        """The file, downloaded if it is on the Hub; errors as of `find`."""
        return find(self.name, **hub_options)

    def digest(self, **hub_options: Any) -> str:
        """SHA-256 of the file; errors as of `find`."""
        path = self.path(**hub_options)
        return _digest(path, path.stat().st_size, path.stat().st_mtime_ns)

    def folder(self, **hub_options: Any) -> Path:
        """The configuration's folder, downloaded without weights if it is on the Hub. Raises ValueError."""
        folder = Path(resolve_teacher(self.config))
        if folder.is_dir():
            return folder
        with explain_hub_errors("configuration", self.config, hub_options.get("revision")):
            return Path(snapshot_download(self.config, allow_patterns=CONFIGURATIONS, **hub_options))


def is_single_file(name: str) -> bool:
    """Whether a teacher's name is that of a file, existing or not, rather than of a folder or a repository."""
    path = Path(name)
    return not is_tiny(name) and (path.is_file() or (name.endswith((SAFE, *PICKLED)) and not path.is_dir()))


def origin_of(name: str, config: str | None = None) -> str:
    """The folder or Hub id with a teacher's configuration: its own name, or for a single file another; see there."""
    file = SingleFile.of(name, config)
    return file.config if file else name


def find(name: str, **hub_options: Any) -> Path:
    """A single file, downloaded if it is on the Hub.

    Args:
        name: as of `SingleFile`.
        hub_options: as of `fetch`; a `revision` is the configuration's, and is not used.

    Raises:
        ValueError: if it is missing, or holds pickled weights.
    """
    if name.endswith(PICKLED):
        raise ValueError(f"{name} holds pickled weights, which can run code and are refused; give a safetensors file.")
    if Path(name).is_file():
        return Path(name)
    repository, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    if not file or name.startswith((".", "/", "~")) or ":" in name:
        raise ValueError(
            f"The teacher's file {name} does not exist; check the path, or give a file on the Hub as "
            "owner/repository/file.safetensors."
        )
    return fetch("teacher", repository, file, **{**hub_options, "revision": None})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a checkpoint, on the meta device, by their names, and its metadata; only the header is read.

    Raises:
        ValueError: if it is damaged, a LoRA, or quantised in a way that needs more than its tensors' dtypes.
    """
    tensors, metadata = _header(path, path.stat().st_size, path.stat().st_mtime_ns)
    if any(LORA_KEY.search(name) for name in tensors) and not any(name.startswith("model.") for name in tensors):
        raise ValueError(f"{path} is a LoRA, not a teacher; give its base model, and the LoRA with --teacher_lora.")
    scaled = next((name for name, each in tensors.items() if QUANTISED.search(name) or each.dtype in INTEGERS), None)
    if scaled is not None:
        raise ValueError(f"{path} holds quantised weights ({scaled[:80]}); give the same model in 16 or 32 bits.")
    return dict(tensors), metadata


@lru_cache(maxsize=8)
def _header(path: Path, size: int, time: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's header, cached by the file's size and time."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
            kinds = {name: (each.get_shape(), DTYPES[each.get_dtype()]) for name, each in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged, or no safetensors file ({described(error)}); download it again."
        ) from error
    except KeyError as error:
        raise ValueError(f"{path} holds weights in {error}; give the same model in 16 or 32 bits.") from error
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in kinds.items()}, metadata


@lru_cache(maxsize=8)
def _digest(path: Path, size: int, time: int) -> str:
    return digest_of_file(path)


def default_config(name: str, tensors: Mapping[str, Tensor]) -> str:
    """The Hub id of the pipeline whose networks have these tensors, as diffusers tells them apart.

    Args:
        name: of the file, for the error.
        tensors: of `read_tensors`.

    Raises:
        ValueError: if the kind is not known, or has releases that differ in more than their weights.
    """
    try:
        kind = infer_diffusers_model_type(tensors)
    except (KeyError, UnboundLocalError, ValueError):
        kind = ""
    if kind == "v1" and CHECKPOINT_KEY_NAMES["v1"] not in tensors:  # which diffusers takes for want of any other
        kind = ""
    if kind not in KNOWN_KINDS:
        seen = f" (it may be a {kind})" if kind else ""
        raise ValueError(
            f"The keys of {name} do not tell which configuration it needs{seen}; give the folder or Hub id of a "
            f"diffusers pipeline of the same kind with {FLAG}."
        )
    return str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])


def predicts_v(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether a file is marked as predicting v, which its networks do not show."""
    return V_PREDICTION[0] in tensors or metadata.get("modelspec.prediction_type") in V_PREDICTION[1:]
