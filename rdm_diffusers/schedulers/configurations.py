"""Configurations of stock schedulers, as `RdmScheduler` reads them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from ..prediction import PREDICTION_TYPES

# What a network was trained with: it holds whatever samples it, also where its scheduler took its own defaults.
TRAINED_WITH = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal",
)  # fmt: skip


def check_settings(prediction_type: str, eta: float, timestep_spacing: str, time_shift_type: str) -> None:
    """Refuses settings that `RdmScheduler` does not know. Raises ValueError."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; use one of {', '.join(PREDICTION_TYPES)}.")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie in [0, 1], from deterministic to full re-noising.")
    if timestep_spacing != "trailing":
        raise ValueError(f"timestep_spacing is {timestep_spacing!r}; RdmScheduler knows 'trailing'.")
    if time_shift_type not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type is {time_shift_type!r}; use exponential or linear.")


def translated(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration in the words of `RdmScheduler`; its own is unchanged.

    The noise schedule and prediction type are the stock class's own where the configuration leaves them out or marks
    them as its defaults, which differ between classes. A class that knows flow matching only names no prediction type.
    Stock spacings of times give way to trailing ones, which start at pure noise.

    Args:
        config: a scheduler's `config`, or what its JSON file holds.
        own: the defaults of `RdmScheduler`.
    """
    known = {**_defaults(config.get("_class_name")), **config}
    if "shift" in known and not {"prediction_type", "beta_schedule"} & known.keys():
        known["prediction_type"] = "flow_prediction"
    if known.get("prediction_type") == "flow_prediction" and "shift" not in known and "flow_shift" in known:
        known["shift"] = known["flow_shift"]
    if "timestep_spacing" in known and "student_timesteps" not in known:  # only our own have the latter
        known["timestep_spacing"] = "trailing"
    differing = {name for name in TRAINED_WITH if name in known and known[name] != own[name]}
    marked = [name for name in config.get("_use_default_values", ()) if name not in differing]
    return {**known, "_use_default_values": marked} if marked else known


def defaults_of(kind: type) -> dict[str, Any]:
    """The defaults of a scheduler's arguments."""
    parameters = inspect.signature(kind.__init__).parameters.items()  # type: ignore[misc]
    return {name: each.default for name, each in parameters if each.default is not each.empty}


def _defaults(class_name: Any) -> dict[str, Any]:
    """What a class of diffusers takes for `TRAINED_WITH` where its JSON file says nothing."""
    stock = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    found = {} if stock is None else defaults_of(stock)
    return {name: found[name] for name in TRAINED_WITH if name in found}
