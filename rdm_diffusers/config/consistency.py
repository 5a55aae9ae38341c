"""Consistency distillation (`--algorithm lcm`) trains on noised pictures: no fake score, no rollouts, no groups."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from .presets import ALGORITHM_DEFAULTS, PRESETS
from .subjects import MethodConfig, RewardsConfig
from .times import TimesConfig

if TYPE_CHECKING:
    from .run_config import RunConfig

IDLE = {
    "method": ("bias_estimator", "pool_steps", "num_renoisings", "importance_weighting", "fake_score_unconditional"),
    "times": (
        "renoising",
        "guidance_range",
        "renoising_time_distribution",
        "fake_time_distribution",
        "logit_mean",
        "logit_std",
        "decoupled_guidance",
    ),
    "rewards": ("reward_tilt",),
}
USUAL = {field.name: field.default for kind in (MethodConfig, TimesConfig, RewardsConfig) for field in fields(kind)}


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
    own = PRESETS["lcm"] | ALGORITHM_DEFAULTS["lcm"] | {"gen_cls_loss_weight": 0.0}
    idle = [name for name, value in own.items() if getattr(method, name) != value]
    for subject, names in IDLE.items():
        idle += [name for name in names if getattr(getattr(config, subject), name) != USUAL[name]]
    if config.optimisation.fake_learning_rate != config.optimisation.learning_rate:
        idle.append("fake_learning_rate")
    if idle:
        raise ValueError(
            f"--{idle[0]} would have no effect with --algorithm lcm, which has no fake score, no rollouts and no "
            "groups; leave it out."
        )
