"""What a run takes where nothing is given: the tiny teachers' defaults, presets, what follows from other flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..families import full_name
from ..tiny import is_tiny
from ..tiny.reference import REFERENCES
from .presets import ALGORITHM_PRESETS, PRESETS, TINY_DEFAULTS, TINY_FULL_DEFAULTS, TINY_LORA_DEFAULTS

TEACHER, VAE = "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"
# What follows from other flags, where it is not given.
DERIVED = (
    *PRESETS["gndm"], "fake_learning_rate", "lora_alpha", "sample_guidance_scale", "tracker_project_name",
)  # fmt: skip


def filled(student: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """All values of a run.

    Args:
        student: `lora` or `full`.
        given: values that were given.
        defaults: of all settings, None where they follow from others.
    """
    values = {**defaults, **_tiny_defaults(student, {**defaults, **given}), **given}
    preset = values["preset"] or ALGORITHM_PRESETS.get(values["algorithm"], "gndm")
    follows = {
        **PRESETS[preset],
        "fake_learning_rate": values["learning_rate"],
        "lora_alpha": values.get("rank"),
        "sample_guidance_scale": values["guidance_scale"],
        "tracker_project_name": f"rdm-{student}",
    }
    values |= {name: value for name, value in follows.items() if values.get(name) is None and name in values}
    for name in (TEACHER, VAE):
        values[name] = values[name] and full_name(values[name])  # for those who export from another folder
    if values.get("lora_layers"):
        values["lora_layers"] = ",".join(name.strip() for name in values["lora_layers"].split(","))
    return values


def _tiny_defaults(student: str, values: Mapping[str, Any]) -> dict[str, Any]:
    if not is_tiny(values[TEACHER]):
        return {}
    own = TINY_LORA_DEFAULTS if student == "lora" else TINY_FULL_DEFAULTS
    scale = {"sample_guidance_scale": REFERENCES[values[TEACHER]].guidance_scale}
    chosen = {**TINY_DEFAULTS, **own, **scale}
    if values["mixed_precision"] != "no":
        chosen.pop("fold_adapters", None)  # adapters are folded in float32 alone
    return chosen
