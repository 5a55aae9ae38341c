"""The method's variants by name, and what is else where an embedded tiny teacher is distilled."""

from __future__ import annotations

from typing import Any

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
