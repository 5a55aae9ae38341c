"""What of a few-step pipeline is saved: stock parts only, with the adapters that it draws with added to the weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.utils import logging, recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer

from ..families import Family
from ..schedulers import RdmScheduler

logger = logging.get_logger(__name__)
STEPS = 50  # what a stochastic stock scheduler without a student's grid is made for
FLOW = ("num_train_timesteps", "shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal")


def stock_parts(pipeline: DiffusionPipeline, family: Family) -> dict[str, Any]:
    """The components of a pipeline that stock diffusers would not load as they are, in a form that it does."""
    adapted = {name: part for name, part in pipeline.components.items() if getattr(part, "peft_config", None)}
    parts = {name: merged(part) for name, part in adapted.items()}
    return {**parts, "scheduler": stock_scheduler(pipeline.scheduler, family)}


def merged(network: Any) -> Any:
    """A copy without adapters: those that are active are added to its weights, those that are disabled are left out."""
    network = copy.deepcopy(network)
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    if layers and all(layer.disable_adapters for layer in layers):
        logger.warning("The adapters of the %s are disabled, so that it is saved without.", type(network).__name__)
    for layer in layers:
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
        elif not layer.disable_adapters and not layer.merged:
            layer.merge()
    recurse_remove_peft_layers(network)
    del network.peft_config
    network._hf_peft_config_loaded = False  # else transformers would look for adapters to save
    return network


def stock_scheduler(scheduler: SchedulerMixin, family: Family) -> SchedulerMixin:
    """A scheduler of diffusers itself that samples as this one does, as far as there is one."""
    if not isinstance(scheduler, RdmScheduler):
        return scheduler
    config, own = scheduler.config, scheduler.student_grid
    if own is None and scheduler.schedule.is_flow:
        settings = {name: config[name] for name in FLOW}
        return FlowMatchEulerDiscreteScheduler(**settings, stochastic_sampling=bool(config.eta))
    return family.stock_scheduler(scheduler, len(own or range(STEPS)), config.eta)


def forget_origins(folder: Path) -> None:
    """Takes out of a saved pipeline's configurations what folder its parts were loaded from."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None):
            path.write_text(json.dumps(config, indent=2) + "\n")
