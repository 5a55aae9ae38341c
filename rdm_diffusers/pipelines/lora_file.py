"""The file of a LoRA student, checked before diffusers and peft build layers from its header."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open

from ..untrusted import Kinds, described, parse_object
from .student_config import REMEDY, TEXT, check_entries, warn_of_change

MAX_HEADER = 2**20  # bytes of the adapter's description
# peft and diffusers read names as regular expressions; one of this kind matches little, and quickly.
NAME = re.compile(r"[A-Za-z0-9_.]{1,400}")
MATRIX = re.compile(r"lora_([AB])(\.bias|\.weight)")
KINDS: dict[str, Kinds] = {  # the entries in which students' adapters differ
    "r": int, "lora_alpha": float, "target_modules": list, "lora_dropout": float, "base_model_name_or_path": TEXT,
    "revision": TEXT, "peft_version": TEXT, "task_type": TEXT, "inference_mode": bool,
}  # fmt: skip
RANGES: dict[str, tuple[float, float]] = {"r": (1, 16_384), "lora_alpha": (1e-6, 1e6), "lora_dropout": (0, 1)}
ADAPTERS = "its adapter's "


def check_lora_file(path: Path, component: str, digest: str | None = None) -> None:
    """Refuses a file that is no LoRA student's, or with which peft would do more than add such a LoRA.

    Only the header is checked. A warning names a file that changed after its export.

    Args:
        path: of `pytorch_lora_weights.safetensors`.
        component: the pipeline's component that the LoRA belongs to, `unet` or `transformer`.
        digest: of its contents (`StudentConfig.weights_sha256`); None for version 0.1.0, which recorded none.

    Raises:
        ValueError: one sentence on what is wrong and what to do.
        ImportError: if a newer peft wrote it.
    """
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
        adapter = {} if header is None else _parse_header(header, component)
        _check_adapter(adapter)
        _check_tensors(shapes, component, adapter.get("r"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({described(error)}); {REMEDY}.") from error
    if digest is not None and digest_of_lora(path) != digest:
        warn_of_change(path, "weights_sha256")


def digest_of_lora(path: Path) -> str:
    """SHA-256 of a LoRA file's tensors and adapter description, in sorted order.

    Not of its bytes, because safetensors writes its header in a random order.
    """
    digest = hashlib.sha256()
    with safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "null")
        digest.update(json.dumps(json.loads(header), sort_keys=True).encode())
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parse_header(header: str, component: str) -> dict[str, Any]:
    """The description of the component's adapter."""
    if len(header) > MAX_HEADER:
        raise ValueError(f"{ADAPTERS}description has more than {MAX_HEADER} characters")
    entries, prefix = parse_object(header), f"{component}."
    for name in entries:
        if not name.startswith(prefix):
            raise ValueError(f"it describes {name[:80]!r}, which is not the {component}'s")
    return {name.removeprefix(prefix): value for name, value in entries.items()}


def _check_adapter(adapter: Mapping[str, Any]) -> None:
    """Refuses entries of a `LoraConfig` that no student has: patterns, extra layers, other methods."""
    from peft import LoraConfig  # slow to import

    defaults = LoraConfig().to_dict()
    for name in adapter.keys() - defaults.keys():
        raise ImportError(
            f"The LoRA names {name[:80]!r}, which this peft does not know; upgrade with `pip install --upgrade peft`."
        )
    check_entries(adapter, KINDS, RANGES, ADAPTERS)
    for module in adapter.get("target_modules", []):
        if not isinstance(module, str) or not NAME.fullmatch(module):
            raise ValueError(f"{ADAPTERS}target_modules hold {str(module)[:80]!r}, which is no module's name")
    for name, value in adapter.items():
        unset = value is None or value is False or value in ([], {}, "", "gaussian")
        if name not in KINDS and not (unset or value == defaults[name]):
            raise ValueError(f"{ADAPTERS}{name} is {str(value)[:80]!r}, and no student's is")


def _check_tensors(shapes: Mapping[str, list[int]], component: str, rank: int | None) -> None:
    """Refuses tensors that are no matrices of a LoRA of this component and rank."""
    if not shapes:
        raise ValueError("it holds no tensors")
    for name, shape in shapes.items():
        matrix = MATRIX.search(name)
        if not NAME.fullmatch(name) or not name.startswith(f"{component}.") or matrix is None:
            raise ValueError(f"it holds {name[:80]!r}, which is no matrix of a LoRA of the {component}")
        side = 0 if matrix[1] == "A" else 1
        if rank is not None and len(shape) > side and matrix[2] == ".weight" and shape[side] != rank:
            raise ValueError(f"{name[:80]} is of rank {shape[side]}, and its adapter of {rank}")
