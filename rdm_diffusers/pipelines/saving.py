"""How a few-step pipeline is saved: as stock components only, with its active adapters added to the weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.utils import logging, recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer

from ..families import Family
from ..schedulers import RdmScheduler

logger = logging.get_logger(__name__)
STEPS = 50  # of a stochastic stock scheduler without a student's grid
FLOW = ("num_train_timesteps", "shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal")


def without_adapters(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Copies, without adapters, of the components that have some."""
    components = pipeline.components.items()
    return {name: _merge_adapters(part) for name, part in components if getattr(part, "peft_config", None)}


def _merge_adapters(network: Any) -> Any:
    """A copy without adapters: active ones are added to its weights, disabled ones are left out."""
    network = copy.deepcopy(network)
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    if layers and all(layer.disable_adapters for layer in layers):
        logger.warning("The adapters of the %s are disabled, so it is saved without them.", type(network).__name__)
    for layer in layers:
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
        elif not layer.disable_adapters and not layer.merged:
            layer.merge()
    recurse_remove_peft_layers(network)
    del network.peft_config
    network._hf_peft_config_loaded = False  # else transformers would look for adapters to save
    return network


def stock_scheduler(scheduler: SchedulerMixin, family: Family, like: SchedulerMixin | None = None) -> SchedulerMixin:
    """The scheduler of diffusers that samples as this one does, in a call with the `stock_grid`.

    Args:
        scheduler: any; only an `RdmScheduler` is replaced.
        family: the teacher's.
        like: a scheduler with the same noise schedule, from which other settings are taken; the same one by default.
    """
    if not isinstance(scheduler, RdmScheduler):
        return scheduler
    config, own = scheduler.config, scheduler.student_grid
    if own is None and scheduler.schedule.is_flow:
        settings = {name: config[name] for name in FLOW}
        return FlowMatchEulerDiscreteScheduler(**settings, stochastic_sampling=bool(config.eta))
    (grid,) = stock_grid(scheduler, family).values() or [()]
    return family.stock_scheduler(like or scheduler, len(own or range(STEPS)), config.eta, grid)


def stock_grid(scheduler: RdmScheduler, family: Family) -> dict[str, Any]:
    """What a stock pipeline must be called with to lay the student's grid: its `timesteps`, or for flow its `sigmas`.

    Empty where the exported scheduler lays it by itself, given the number of steps.
    """
    own = scheduler.student_grid
    if own is None:
        return {}
    usual = family.stock_scheduler(scheduler, len(own), scheduler.config.eta)
    usual.set_timesteps(len(own))
    if torch.allclose(usual.timesteps.double(), torch.tensor(own, dtype=torch.float64), atol=1e-3):
        return {}
    name = "sigmas" if scheduler.schedule.is_flow else "timesteps"
    return {name: list(scheduler.config[f"student_{name}"])}


def remove_origins(folder: Path) -> None:
    """Removes the local paths that components were loaded from out of a saved pipeline's configurations."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None):
            path.write_text(json.dumps(config, indent=2) + "\n")
