"""Scenes of checkpoints: saved, rotated, saved over, found and loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from fault_scenes import DamageScene, KillScene, equal, hidden, same_result
from fault_trials import DEBRIS, INTACT, LOST, SILENT, Verdict

from rdm_diffusers.networks import FAKE_SCORE, STUDENT
from rdm_diffusers.training.checkpoint_files import find_checkpoint
from rdm_diffusers.training.checkpoints import TrainState, load_checkpoint, save_checkpoint
from rdm_diffusers.training.optimizers import RoleOptimizer


def make_state(update: int) -> TrainState:
    """A small run's state after an update; every update has numbers of its own."""
    generator = torch.Generator().manual_seed(update)
    optimizers = {role: _optimizer(generator) for role in (STUDENT, FAKE_SCORE)}
    state = TrainState(optimizers, EMAModel(optimizers[STUDENT].parameters), update)
    state.statistics.update("a/b", torch.rand(2, generator=generator), torch.tensor([3, 0]), 0.9)
    state.monitor.state |= {"updates": float(update), "smooth/fake_loss": update / 3}
    return state


def _optimizer(generator: torch.Generator) -> RoleOptimizer:
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((16, 8), (16,))]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return RoleOptimizer(parameters, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0), 1.0)


def numbers(state: TrainState) -> dict[str, Any]:
    """A copy of all numbers that a checkpoint holds."""
    roles = {
        role: [[p.detach() for p in each.parameters], each.optimizer.state_dict()["state"]]
        for role, each in state.optimizers.items()
    }
    averages = [] if state.ema is None else list(state.ema.shadow_params)
    rest = {"ema": averages, "means": state.statistics.state, "health": state.monitor.state}
    return deepcopy({"update": state.update, **roles, **rest})


@cache
def reference(update: int) -> dict[str, Any]:
    """The numbers of an update, from memory only."""
    return numbers(make_state(update))


def loaded(folder: Path, name: str = "latest") -> dict[str, Any]:
    """The numbers that a run would resume with."""
    state = make_state(99)
    load_checkpoint(find_checkpoint(folder, name), state)
    return numbers(state)


def saving(*there: int, keep: int | None = None) -> KillScene:
    """Update 3 is saved beside the saved updates `there`, and killed."""
    name = f"checkpoint 3 beside {', '.join(map(str, there)) or 'none'}" + (f", limit {keep}" if keep else "")

    def prepare(folder: Path) -> None:
        for update in there:
            save_checkpoint(folder, make_state(update), {"seed": 0})

    def act(folder: Path) -> None:
        save_checkpoint(folder, make_state(3), {"seed": 0}, keep)

    return KillScene(name, prepare, act, lambda folder: _judge(folder, there, keep))


def _judge(folder: Path, there: Sequence[int], keep: int | None) -> Verdict:
    """The latest is whole and no older than before, all others that should stay are whole, and saving still works."""
    least = max(there, default=0)
    if least:
        verdict = _latest(folder, least)
        if verdict.outcome != INTACT:
            return verdict
    for update in there if keep is None else ():
        if not equal(loaded(folder, f"checkpoint-{update}"), reference(update)):
            return Verdict(SILENT, f"checkpoint-{update} holds other numbers")
    save_checkpoint(folder, make_state(4), {"seed": 0}, keep)
    verdict = _latest(folder, 4)
    left = hidden(folder) - _hidden_after_a_save(folder)
    return Verdict(DEBRIS, ", ".join(sorted(left))) if verdict.outcome == INTACT and left else verdict


def _latest(folder: Path, least: int) -> Verdict:
    try:
        found = loaded(folder)
    except Exception as error:  # whatever it is, the run cannot go on
        return Verdict(LOST, f"{type(error).__name__}: {error}")
    if not equal(found, reference(found["update"])):
        return Verdict(SILENT, f"the checkpoint of update {found['update']} holds other numbers")
    return Verdict(INTACT if found["update"] >= least else LOST, f"the latest is of update {found['update']}")


def _hidden_after_a_save(folder: Path) -> set[str]:
    """The hidden files after an undisturbed save, such as a lock."""
    untouched = folder / "untouched"
    save_checkpoint(untouched, make_state(4), {"seed": 0})
    return hidden(untouched)


def _two(folder: Path) -> None:
    for update in (2, 3):
        save_checkpoint(folder / "run", make_state(update), {"seed": 0})


def _with_another(folder: Path) -> None:
    _two(folder)
    save_checkpoint(folder / "another", make_state(7), {"seed": 1})
    (folder / "another" / "checkpoint-7").rename(folder / "another" / "checkpoint-3")


def _reading(name: str, asked: str, prepare: Callable[[Path], None], rounds: int) -> DamageScene:
    return DamageScene(
        name, prepare, ["run/checkpoint-3/*"], lambda folder: loaded(folder / "run", asked), same_result,
        other="another", rounds=rounds,
    )  # fmt: skip


KILLS = [
    saving(), saving(2), saving(1, 2), saving(2, keep=1), saving(1, 2, keep=2), saving(2, 3), saving(2, 3, keep=1),
    saving(3, keep=1),
]  # fmt: skip
DAMAGE = [
    _reading("latest checkpoint", "latest", _with_another, rounds=3),
    _reading("checkpoint by name", "checkpoint-3", _with_another, rounds=2),
]
