"""The arguments in a checkpoint that somebody else may have made, before networks are built after them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..json_files import Kinds, check_kinds, read_object
from ..links import real_path
from .checkpoint_files import RECORD

REMEDY = "export an earlier checkpoint"
TEXT: Kinds = (str, type(None))
COUNT: Kinds = (int, type(None))
KINDS: dict[str, Kinds] = {  # of those that an export looks at
    "pretrained_model_name_or_path": str, "pretrained_vae_model_name_or_path": TEXT, "revision": TEXT, "variant": TEXT,
    "student": str, "lora_layers": TEXT, "quantization": TEXT, "resolution": COUNT, "max_sequence_length": COUNT,
    "num_student_steps": int, "eta": float, "rank": int, "lora_alpha": (float, type(None)), "max_train_steps": int,
    "guidance_scale": float,
}  # fmt: skip
RANGES = {
    "num_student_steps": (1, 1000), "eta": (0, 1), "rank": (1, 16_384), "resolution": (8, 8192),
    "max_sequence_length": (1, 8192),
}  # fmt: skip


def check_saved(checkpoint: Path) -> None:
    """Refuses a checkpoint with links out of its folder, or whose record an export cannot be made by.

    Raises:
        ValueError: one sentence on what is wrong and what to do.
    """
    for file in checkpoint.iterdir():
        real_path(checkpoint, file)
    path = checkpoint / RECORD
    record = read_object(path, REMEDY)
    try:
        check_kinds(record, {"arguments": dict, "digests": dict, "update": int})
        _check(record.get("arguments", {}))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {REMEDY}.") from error


def _check(arguments: Mapping[str, Any]) -> None:
    check_kinds(arguments, KINDS, "argument ")
    for name, (low, high) in RANGES.items():
        value = arguments.get(name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"argument {name} is {value}, and should be from {low} to {high}")
