"""Consistency distillation (`--algorithm lcm`) trains on noised pictures: no fake score, no rollouts, no groups."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from ..distillation import settings_of
from .presets import ALGORITHM_DEFAULTS, PRESETS
from .subjects import MethodConfig, RewardsConfig
from .times import TimesConfig

if TYPE_CHECKING:
    from .run_config import RunConfig

# What it reads of these subjects; all else must be as it is by default.
READ = (
    *settings_of("lcm"), "algorithm", "preset", "num_student_steps", "eta", "guidance_scale", "sample_guidance_scale",
    "student_grid", "student_sigmas", "student_timesteps", "guidance_interval",
)  # fmt: skip
USUAL = {
    subject: {field.name: field.default for field in fields(kind) if field.name not in READ}
    for subject, kind in {"method": MethodConfig, "times": TimesConfig}.items()
}
USUAL["method"] |= PRESETS["lcm"] | ALGORITHM_DEFAULTS["lcm"] | {"gen_cls_loss_weight": 0.0}


def check_consistency(config: RunConfig) -> None:
    """ValueError for what would have no effect without fake score, rollouts and groups."""
    method = config.method
    if method.algorithm != "lcm":
        if method.preset == "lcm":
            raise ValueError(
                f"--preset lcm trains no fake score, which --algorithm {method.algorithm} needs; leave it out."
            )
        return
    if method.preset not in (None, "lcm"):
        raise ValueError(f"--algorithm lcm is the preset lcm; leave --preset {method.preset} out.")
    idle = [
        name
        for subject, usual in USUAL.items()
        for name, value in usual.items()
        if getattr(getattr(config, subject), name) != value
    ]
    if config.rewards.reward_tilt != RewardsConfig.reward_tilt:
        idle.append("reward_tilt")
    if config.optimisation.fake_learning_rate != config.optimisation.learning_rate:
        idle.append("fake_learning_rate")
    if idle:
        raise ValueError(
            f"--{idle[0]} would have no effect with --algorithm lcm, which has no fake score, no rollouts and no "
            "groups; leave it out."
        )
