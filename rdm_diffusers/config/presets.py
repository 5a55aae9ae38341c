"""What a run takes where nothing is given: presets, the tiny teachers' defaults, what follows from other flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..families import Lora, full_name, rank_of
from ..tiny import is_tiny
from ..tiny.reference import REFERENCES

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    # name          correction            what R_dm is divided by           fake score               rollouts
    "dmd2":         dict(gndm_lambda=0.0, advantage_normalization="sample", fake_updates_per_step=5, reuse_rollouts=1),
    "gndm":         dict(gndm_lambda=1.0, advantage_normalization="group",  fake_updates_per_step=1, reuse_rollouts=1),
    "gndm-literal": dict(gndm_lambda=0.0, advantage_normalization="std",    fake_updates_per_step=5, reuse_rollouts=1),
    "gndm-fast":    dict(gndm_lambda=1.0, advantage_normalization="group",  fake_updates_per_step=1, reuse_rollouts=2),
}
ALGORITHM_PRESETS = {"dmd": "dmd2", "gndm": "gndm", "gndmr": "gndm"}
# fmt: on

# On two CPU cores, in about ten minutes.
TINY_DEFAULTS: dict[str, Any] = dict(
    guidance_scale=2.0,
    steps_per_rollout=4,
    train_batch_size=64,
    max_train_steps=1400,
    learning_rate=1e-3,
    lr_scheduler="cosine",
    num_eval_images=5000,
)
TINY_LORA_DEFAULTS: dict[str, Any] = dict(rank=16, fold_adapters=True)
TINY_FULL_DEFAULTS: dict[str, Any] = dict(learning_rate=5e-4)

TEACHER, VAE = "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"
# What follows from other flags, where it is not given.
DERIVED = (
    *PRESETS["gndm"], "decode_batch_size", "fake_learning_rate", "lora_alpha", "sample_guidance_scale", "target_rank",
    "tracker_project_name",
)  # fmt: skip


def filled(student: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """All values of a run of a `lora` or `full` student: those given, else the defaults, None where they follow."""
    values = {**defaults, **_tiny_defaults(student, {**defaults, **given}), **given}
    values |= _loras(values, rank_is_given="rank" in given)
    grid = values["student_sigmas"] or values["student_timesteps"]
    if grid and "num_student_steps" not in given:
        values["num_student_steps"] = len(grid)
    preset = values["preset"] or ALGORITHM_PRESETS.get(values["algorithm"], "gndm")
    follows = {
        **PRESETS[preset],
        "decode_batch_size": values["train_batch_size"],
        "fake_learning_rate": values["learning_rate"],
        "lora_alpha": values.get("rank"),
        "sample_guidance_scale": values["guidance_scale"],
        "target_rank": values.get("rank", 64),
        "tracker_project_name": f"rdm-{student}",
    }
    values |= {name: value for name, value in follows.items() if values.get(name) is None and name in values}
    for name in (TEACHER, VAE):
        values[name] = values[name] and full_name(values[name])  # for those who export from another folder
    if values.get("lora_layers"):
        values["lora_layers"] = ",".join(name.strip() for name in values["lora_layers"].split(","))
    return values


def _loras(values: Mapping[str, Any], rank_is_given: bool) -> dict[str, Any]:
    """The LoRAs by their full paths, and the rank of the one that the student starts from."""
    found: dict[str, Any] = {"teacher_lora": tuple(str(Lora.parse(each)) for each in values["teacher_lora"])}
    if values.get("init_lora"):
        found["init_lora"] = str(Lora.parse(values["init_lora"]))
        if not rank_is_given:
            found["rank"] = rank_of(found["init_lora"])
    return found


def _tiny_defaults(student: str, values: Mapping[str, Any]) -> dict[str, Any]:
    if not is_tiny(values[TEACHER]):
        return {}
    own = TINY_LORA_DEFAULTS if student == "lora" else TINY_FULL_DEFAULTS
    scale = {"sample_guidance_scale": REFERENCES[values[TEACHER]].guidance_scale}
    chosen = {**TINY_DEFAULTS, **own, **scale}
    if values["teacher_target"] == "samples":
        chosen |= {"guidance_scale": scale["sample_guidance_scale"], "target_learning_rate": 1e-3}
    if values["teacher_lora"]:
        chosen.pop("num_eval_images")  # the shipped references are of the teachers alone
    if values["mixed_precision"] != "no":
        chosen.pop("fold_adapters", None)  # adapters are folded in float32 alone
    return chosen
