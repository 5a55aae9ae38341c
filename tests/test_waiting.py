"""How often an update waits for the device: run on the meta device, which has no numbers to read by accident."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import make_run, run_arguments, train_run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rdm_diffusers.distillation import Draws
from rdm_diffusers.training.assembly import make_state
from rdm_diffusers.training.trainer import Trainer

aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Counts readings of the device, where every number is 1, and refuses copies to it that wait.

    What else needs numbers, such as an index by a mask, is an error of the meta device itself.
    """

    readings = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        source, target = (args[0] if args and isinstance(args[0], Tensor) else None), kwargs.get("device")
        if source is not None and source.is_meta and func is aten._local_scalar_dense.default:
            self.readings += 1
            return True if source.dtype == torch.bool else 1.0
        if source is not None and func is aten._to_copy.default and target is not None:
            if source.is_meta and target.type == "cpu":
                self.readings += 1
                return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            assert source.is_meta or target.type == "cpu" or kwargs.get("non_blocking"), "a copy to the device waits"
        return func(*args, **kwargs)


def on_meta(it: Trainer) -> Trainer:
    """The run with all that an update computes with on the meta device."""
    run, networks = it.distillation, it.networks
    networks.place(lambda module: module.to("meta"))
    networks.null_conditioning = networks.null_conditioning.to("meta", torch.float32)
    networks.schedule = networks.schedule.to("meta")
    it.teacher.pipeline.vae.to("meta")
    draws = Draws(run.draws.seed, run.draws.group_size, "meta")
    renoising = replace(run.renoising, schedule=networks.schedule)
    it.distillation = replace(run, draws=draws, prompts=replace(run.prompts, draws=draws), renoising=renoising)
    it.state = make_state(networks, it.accelerator, it.config)
    return it


REWARDS = """def bright(images, prompts):
    return images.mean((1, 2, 3))


def dark(images, prompts):
    return -images.mean((1, 2, 3))


dark.differentiable = False
"""


@pytest.mark.parametrize(
    ("flags", "updates", "checks"),
    [
        ({"reuse_rollouts": 2, "importance_weighting": "clipped", "num_renoisings": 2, "steps_per_rollout": 2}, 2, 2),
        ({"algorithm": "gndmr", "reward": ["bright", "dark"], "train_batch_size": 2, "fake_updates_per_step": 2}, 1, 3),
    ],
    ids=["reuse", "rewards_and_micro_batches"],
)
def test_an_update_waits_once_for_each_optimisers_step_and_once_for_its_health(
    flags: dict, updates: int, checks: int, teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    options = {"train_batch_size": 4, "group_size": 2, "fake_updates_per_step": 1, "max_train_steps": updates}
    options |= {"lora_layers": "to_q", **flags}
    options["reward"] = [f"{tmp_path}/rewards.py:{name}" for name in flags.get("reward", [])]
    options["gradient_accumulation_steps"] = 4 // options["train_batch_size"]
    it = on_meta(make_run(run_arguments(teacher_folder, prompts_file, tmp_path / "student", **options)))
    with Waits() as waits:
        assert train_run(it) == 0
    assert it.state.update == updates
    assert waits.readings == updates * (checks + 1)
