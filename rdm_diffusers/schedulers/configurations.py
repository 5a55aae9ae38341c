"""Configurations of stock schedulers, as `RdmScheduler` reads them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from ..prediction import PREDICTION_TYPES

# What the network was trained with. It holds for every sampler, even if the scheduler's file leaves it to a default.
TRAINED_WITH = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal",
)  # fmt: skip


def check_settings(prediction_type: str, eta: float, timestep_spacing: str, time_shift_type: str) -> None:
    """Raises ValueError for settings that `RdmScheduler` does not support."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; use one of {', '.join(PREDICTION_TYPES)}.")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie in [0, 1], from deterministic to full re-noising.")
    if timestep_spacing != "trailing":
        raise ValueError(f"timestep_spacing is {timestep_spacing!r}; RdmScheduler supports only 'trailing'.")
    if time_shift_type not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type is {time_shift_type!r}; use exponential or linear.")


def translate_config(config: Mapping[str, Any], own_class: type) -> dict[str, Any]:
    """A scheduler's configuration in the terms of `RdmScheduler`; a configuration of its own is unchanged.

    Where the configuration leaves out the noise schedule or the prediction type, or marks them as defaults, the
    defaults of its stock class apply, which differ between classes. A class that supports only flow matching names no
    prediction type. Stock spacings become `trailing`, which starts at pure noise.
    """
    name, own = config.get("_class_name"), _defaults_of(own_class)
    stock = _defaults_of(getattr(diffusers, name, None)) if isinstance(name, str) else {}
    full = {**{each: stock[each] for each in TRAINED_WITH if each in stock}, **config}
    if "shift" in full and not {"prediction_type", "beta_schedule"} & full.keys():
        full["prediction_type"] = "flow_prediction"
    if full.get("prediction_type") == "flow_prediction" and "shift" not in full and "flow_shift" in full:
        full["shift"] = full["flow_shift"]
    if "timestep_spacing" in full and "student_timesteps" not in full:  # only our own have the latter
        full["timestep_spacing"] = "trailing"
    differing = {each for each in TRAINED_WITH if each in full and full[each] != own[each]}
    marked = [each for each in config.get("_use_default_values", ()) if each not in differing]
    return {**full, "_use_default_values": marked} if marked else full


def _defaults_of(scheduler_class: type | None) -> dict[str, Any]:
    """The defaults of a scheduler's arguments; empty without a class."""
    parameters = inspect.signature(scheduler_class.__init__).parameters if scheduler_class else {}  # type: ignore[misc]
    return {name: each.default for name, each in parameters.items() if each.default is not each.empty}
