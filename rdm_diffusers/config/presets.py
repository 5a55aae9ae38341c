"""What a run takes where nothing is given: presets, the tiny teachers' defaults, what follows from other flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..distillation.snoopi import range_around
from ..families import Lora, full_name, rank_of
from ..sizes import read_buckets
from ..tiny import TINY_SCENES_NAME, is_tiny
from ..tiny.domains import domain_of
from ..tiny.reference import REFERENCES

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    # name          correction            what R_dm is divided by           fake score               rollouts
    "dmd2":         dict(gndm_lambda=0.0, advantage_normalization="sample", fake_updates_per_step=5, reuse_rollouts=1),
    "gndm":         dict(gndm_lambda=1.0, advantage_normalization="group",  fake_updates_per_step=1, reuse_rollouts=1),
    "gndm-literal": dict(gndm_lambda=0.0, advantage_normalization="std",    fake_updates_per_step=5, reuse_rollouts=1),
    "gndm-fast":    dict(gndm_lambda=1.0, advantage_normalization="group",  fake_updates_per_step=1, reuse_rollouts=2),
    "sid":          dict(gndm_lambda=0.0, advantage_normalization="sample", fake_updates_per_step=1, reuse_rollouts=1),
    "sim":          dict(gndm_lambda=0.0, advantage_normalization="none",   fake_updates_per_step=1, reuse_rollouts=1),
    "tdm":          dict(gndm_lambda=0.0, advantage_normalization="none",   fake_updates_per_step=1, reuse_rollouts=1),
    "snoopi":       dict(gndm_lambda=0.0, advantage_normalization="sample", fake_updates_per_step=1, reuse_rollouts=1),
    "lcm":          dict(gndm_lambda=0.0, advantage_normalization="none",   fake_updates_per_step=0, reuse_rollouts=1),
}
ALGORITHM_PRESETS = {
    "dmd": "dmd2", "gndm": "gndm", "gndmr": "gndm", "dmd2": "dmd2", "f_distill": "dmd2", "uni_instruct": "dmd2",
    "sid": "sid", "sim": "sim", "tdm": "tdm", "snoopi": "snoopi", "lcm": "lcm",
}
# What an algorithm has instead of the defaults, whatever the preset.
ALGORITHM_DEFAULTS: dict[str, dict[str, Any]] = {
    "tdm": dict(eta=0.0, renoising="interval"),
    "lcm": dict(group_size=1, steps_per_rollout=1, fake_score_steps=False),  # each sample is alone
}
# fmt: on

TINY_DEFAULTS: dict[str, Any] = dict(steps_per_rollout=4, num_eval_images=5000)
TINY_LORA_DEFAULTS: dict[str, Any] = dict(rank=16, fold_adapters=True)
TINY_TARGETS: dict[str, dict[str, Any]] = {
    # The guidance is a constant that works for R_dm, not the one that the teacher is sampled at.
    "score": dict(
        guidance_scale=2.0, train_batch_size=64, max_train_steps=1400, learning_rate=1e-3, lr_scheduler="cosine",
    ),
    "samples": dict(
        train_batch_size=128, max_train_steps=600, learning_rate=4e-4, lr_scheduler="constant", ema_decay=0.992,
        fake_score_steps=True, num_target_images=6000, target_inference_steps=25, target_train_steps=750,
        target_batch_size=128, target_learning_rate=2e-3, target_rank=64,
    ),
}  # fmt: skip
GEN_CLS_LOSS_WEIGHTS = {"dmd2": 5e-3, "f_distill": 5e-3}  # as DMD2's for Stable Diffusion
F_DIVERGENCE = {"f_distill": "jensen_shannon", "uni_instruct": "reverse_kl"}  # forward_kl diverges on tiny
FULL_LEARNING_RATE = 0.5  # of a LoRA's
TINY_FAKE_RATE = 4  # times the student's, where both start at the target

EPOCHS, UPDATES = "num_train_epochs", "max_train_steps"
TEACHER, VAE = "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"
SOURCES = (TEACHER, VAE, "single_file_config")  # by their full paths, for those who export from another folder
# What follows from other flags, where it is not given.
DERIVED = (
    *PRESETS["gndm"], "decode_batch_size", "f_divergence", "fake_learning_rate", "gen_cls_loss_weight", "lora_alpha",
    "resolution", "sample_guidance_scale", "target_rank", "tracker_project_name",
)  # fmt: skip


def filled(student: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """All values of a run of a `lora` or `full` student: those given, else the defaults, None where they follow."""
    values = {**defaults, **_tiny_defaults(student, defaults, given), **given}
    values |= {name: value for name, value in _algorithm_defaults(values).items() if name not in given}
    values |= _loras(values, rank_is_given="rank" in given)
    if UPDATES in given:
        values[EPOCHS] = None
    grid = values["student_sigmas"] or values["student_timesteps"]
    if grid and "num_student_steps" not in given:
        values["num_student_steps"] = len(grid)
    if "steps_per_rollout" not in given:
        values["steps_per_rollout"] = _steps_per_rollout(values)
    preset = values["preset"] or ALGORITHM_PRESETS.get(values["algorithm"], "gndm")
    at_target = is_tiny(values[TEACHER]) and values["teacher_target"] == "samples" and values["algorithm"] != "lcm"
    follows = {
        **PRESETS[preset],
        "decode_batch_size": values["train_batch_size"],
        "f_divergence": F_DIVERGENCE.get(values["algorithm"]),
        "gen_cls_loss_weight": GEN_CLS_LOSS_WEIGHTS.get(values["algorithm"], 0.0),
        "fake_learning_rate": values["learning_rate"] * (TINY_FAKE_RATE if at_target else 1),
        "lora_alpha": values.get("rank"),
        "resolution": read_buckets(values["aspect_ratio_buckets"])[0] if values["aspect_ratio_buckets"] else None,
        "sample_guidance_scale": values["guidance_scale"],
        "target_rank": values.get("rank", 64),
        "tracker_project_name": f"rdm-{student}",
    }
    values |= {name: value for name, value in follows.items() if values.get(name) is None and name in values}
    for name in SOURCES:
        values[name] = values[name] and full_name(values[name])
    if values.get("lora_layers"):
        values["lora_layers"] = ",".join(name.strip() for name in values["lora_layers"].split(","))
    return values


def below(settings: Mapping[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """A file's settings without its number of updates, where a number of epochs is `given` on top of the file."""
    return {name: value for name, value in settings.items() if name != UPDATES or EPOCHS not in given}


def _algorithm_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """What an algorithm has where it is not given, whatever the preset."""
    if values["algorithm"] == "snoopi" and values["guidance_scale"] > 1:
        return {"guidance_range": range_around(values["guidance_scale"])}
    return ALGORITHM_DEFAULTS.get(values["algorithm"], {})


def _steps_per_rollout(values: Mapping[str, Any]) -> int:
    """The default, or as much of it as the student's steps and the samples of an update allow."""
    steps, groups = values["steps_per_rollout"], max(1, values["group_size"])
    samples = values["train_batch_size"] * values["gradient_accumulation_steps"]
    while steps > 1 and (steps > values["num_student_steps"] or samples % (steps * groups)):
        steps //= 2
    return int(steps)


def _loras(values: Mapping[str, Any], rank_is_given: bool) -> dict[str, Any]:
    """The LoRAs by their full paths, and the rank of the one that the student starts from."""
    found: dict[str, Any] = {"teacher_lora": tuple(str(Lora.parse(each)) for each in values["teacher_lora"])}
    if values.get("init_lora"):
        found["init_lora"] = str(Lora.parse(values["init_lora"]))
        if not rank_is_given:
            found["rank"] = rank_of(found["init_lora"])
    return found


def _tiny_defaults(student: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    values = {**defaults, **given}
    if not is_tiny(values[TEACHER]):
        return {}
    scale, size = REFERENCES[values[TEACHER]].guidance_scale, domain_of(values[TEACHER]).image_size
    slow = values[TEACHER] == TINY_SCENES_NAME  # to draw the images of a target would take longer than the run
    target = given.get("teacher_target", "score" if slow else "samples")
    chosen = {"teacher_target": target, "guidance_scale": scale, "sample_guidance_scale": scale, **TINY_DEFAULTS}
    chosen |= TINY_TARGETS.get(target, TINY_TARGETS["score"])
    if student == "lora":
        chosen |= TINY_LORA_DEFAULTS
    else:
        chosen["learning_rate"] *= FULL_LEARNING_RATE
    if values["train_data_dir"] or values["image_column"]:
        for name in ("num_target_images", "target_inference_steps"):
            chosen.pop(name, None)  # the teacher draws nothing, unless that is asked for
    if values["teacher_lora"] or values["aspect_ratio_buckets"] or values["resolution"] not in (None, size):
        chosen.pop("num_eval_images")  # the shipped references are of the teachers alone, and of their own size
    if values["mixed_precision"] != "no":
        chosen.pop("fold_adapters", None)  # adapters are folded in float32 alone
    return chosen
