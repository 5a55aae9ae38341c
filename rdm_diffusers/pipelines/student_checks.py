"""What a student's configuration may hold: a damaged or hostile one is one sentence, before anything is loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..json_files import Kinds, check_kinds, is_kind

REMEDY = "download or export the student again"
TEXT: Kinds = (str, type(None))
STUDENT_KINDS: dict[str, Kinds] = {
    "base_model_name_or_path": TEXT, "pipeline_class": str, "scheduler": dict, "num_inference_steps": int,
    "call_arguments": dict, "revision": TEXT, "variant": TEXT, "vae": TEXT, "license": dict, "training": dict,
    "weights_sha256": TEXT, "scheduler_sha256": TEXT, "version": TEXT, "format_version": int,
}  # fmt: skip
TRAINING_KINDS: dict[str, Kinds] = {
    "command": TEXT, "arguments": dict, "updates": (int, type(None)), "averaged": (bool, type(None)),
}  # fmt: skip
ARGUMENT_KINDS: dict[str, Kinds] = {  # of those that anything but a reader looks at
    "pretrained_model_name_or_path": TEXT, "student": TEXT, "algorithm": TEXT, "reward": (list, type(None)),
    "resolution": (int, type(None)), "train_batch_size": (int, type(None)), "num_processes": (int, type(None)),
    "gradient_accumulation_steps": (int, type(None)),
}  # fmt: skip
SCHEDULER_KINDS: dict[str, Kinds] = {
    "_class_name": str, "num_train_timesteps": int, "beta_start": float, "beta_end": float, "beta_schedule": str,
    "trained_betas": (list, type(None)), "rescale_betas_zero_snr": bool, "prediction_type": str, "eta": float,
    "student_timesteps": (list, type(None)), "student_sigmas": (list, type(None)), "timestep_spacing": str,
    "shift": float, "steps_offset": int,
}  # fmt: skip
CALL_KINDS: dict[str, Kinds] = {
    "guidance_scale": float, "true_cfg_scale": float, "height": int, "width": int, "max_sequence_length": int,
    "use_resolution_binning": bool,
}  # fmt: skip
MAX_TRAIN_TIMESTEPS = 100_000
# The lowest and the highest number of each name. A picture of 8,192 pixels a side is beyond every teacher there is.
RANGES: dict[str, tuple[float, float]] = {
    "format_version": (1, math.inf), "num_inference_steps": (1, 1000), "eta": (0, 1),
    "num_train_timesteps": (1, MAX_TRAIN_TIMESTEPS),
    "beta_start": (0, 1), "beta_end": (0, 1), "shift": (1e-3, 1e3), "steps_offset": (0, 1000),
    "guidance_scale": (0, 1000), "true_cfg_scale": (0, 1000), "height": (8, 8192), "width": (8, 8192),
    "max_sequence_length": (1, 8192),
}  # fmt: skip


def warn_of_change(path: Path, entry: str) -> None:
    """Says that a student's file is not as it was exported, by an entry of `rdm_config.json`; it is used still."""
    warnings.warn(
        f"{path} was changed since it was exported, as {entry} in rdm_config.json says; if nobody did that on purpose, "
        f"{REMEDY}.",
        stacklevel=4,
    )


def check_student_entries(entries: Mapping[str, Any]) -> None:
    """Refuses what `rdm_config.json` cannot hold.

    Args:
        entries: its own; those that are missing are for the dataclass to miss.

    Raises:
        ValueError: naming the first entry that is wrong, and what it should be.
    """
    check_kinds(entries, STUDENT_KINDS)
    _check_ranges(entries)
    check_scheduler(entries.get("scheduler", {}), "scheduler's ")
    check_call_arguments(entries.get("call_arguments", {}))
    license_tags = entries.get("license", {})
    check_kinds(license_tags, dict.fromkeys(license_tags, str), "license's ")
    check_kinds(entries.get("training", {}), TRAINING_KINDS, "training's ")
    arguments = entries.get("training", {}).get("arguments", {})
    check_kinds(arguments, ARGUMENT_KINDS, "training's argument ")
    if not all(isinstance(reward, str) for reward in arguments.get("reward") or []):
        raise ValueError("training's argument reward should hold text")


def check_scheduler(config: Mapping[str, Any], inside: str = "") -> None:
    """Refuses a scheduler's configuration of numbers that none can have, or that would fill the memory.

    Args:
        config: ours or a stock one; names that are not ours are the scheduler's own affair.
        inside: what it is called, for the error.

    Raises:
        ValueError: naming the first entry that is wrong, and what it should be.
    """
    check_kinds(config, SCHEDULER_KINDS, inside)
    _check_ranges(config, inside)
    last = config.get("num_train_timesteps", 1000)
    for name, highest in (("trained_betas", 1), ("student_timesteps", last), ("student_sigmas", 1)):
        values = config.get(name) or []
        if len(values) > MAX_TRAIN_TIMESTEPS:
            raise ValueError(f"{inside}{name} has {len(values)} numbers")
        if not all(is_kind(value, float) and 0 <= value <= highest for value in values):
            raise ValueError(f"{inside}{name} should hold numbers from 0 to {highest}")


def check_call_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuses what a student is not called with: other names than `CALL_KINDS`, and sizes beyond use.

    Raises:
        ValueError: naming the first that is wrong, and what it should be.
    """
    unknown = [name for name in arguments if name not in CALL_KINDS]
    if unknown:
        raise ValueError(f"call_arguments has {unknown[0][:40]!r}, with which no student is called")
    check_kinds(arguments, CALL_KINDS, "call_arguments' ")
    _check_ranges(arguments, "call_arguments' ")


def _check_ranges(entries: Mapping[str, Any], inside: str = "") -> None:
    for name, (low, high) in RANGES.items():
        if name in entries and not low <= entries[name] <= high:
            raise ValueError(f"{inside}{name} is {entries[name]}, and should be from {low:g} to {high:g}")
