"""Checkpoints: safetensors and JSON only, written aside and renamed, so that a good one is never damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..distillation import RunningMeans
from .monitor import Monitor
from .optimizers import RoleOptimizer

PREFIX = "checkpoint-"
STATISTICS = "statistics/"


@dataclass
class TrainState:
    """All that an update changes. Random numbers need no state: they are keyed by the update (`Draws`).

    Args:
        optimizers: each trained role's parameters and optimiser.
        ema: the student's moving average; None without.
        update: how many updates are done.
        statistics: the method's running means.
        monitor: the health numbers' memory.
    """

    optimizers: dict[str, RoleOptimizer]
    ema: EMAModel | None
    update: int = 0
    statistics: RunningMeans = field(default_factory=RunningMeans)
    monitor: Monitor = field(default_factory=Monitor)


def save_checkpoint(folder: Path, state: TrainState, arguments: dict, keep: int | None = None) -> Path:
    """Writes `folder/checkpoint-<update>`, then removes the oldest beyond `keep`.

    Raises:
        OSError: if it cannot be written, for example on a full disk; earlier checkpoints are untouched then.
    """
    target = folder / f"{PREFIX}{state.update}"
    partial = folder / f".partial-{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        tensors, scalars = _pack(state)
        save_file(tensors, partial / "state.safetensors")
        record = {"update": state.update, "scalars": scalars, "monitor": state.monitor.state, "arguments": arguments}
        (partial / "state.json").write_text(json.dumps(record, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"The checkpoint {target} could not be written ({error}); the earlier ones are intact. Free some space and "
            "resume with --resume_from_checkpoint latest."
        ) from error
    for old in list_checkpoints(folder)[: -keep if keep else 0]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if (path / "state.json").exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def find_checkpoint(folder: Path, name: str) -> Path:
    """The checkpoint that `--resume_from_checkpoint` names: `latest`, a name in `folder`, or a path.

    Raises:
        ValueError: if there is none.
    """
    if name == "latest":
        found = list_checkpoints(folder)
        if not found:
            raise ValueError(f"There is no checkpoint in {folder} to resume from; leave --resume_from_checkpoint out.")
        return found[-1]
    for path in (folder / name, Path(name)):
        if (path / "state.json").exists():
            return path
    raise ValueError(f"--resume_from_checkpoint {name} is no checkpoint; use `latest` or a checkpoint-N folder.")


def read_arguments(checkpoint: Path) -> dict:
    """The arguments of the run that wrote a checkpoint."""
    return json.loads((checkpoint / "state.json").read_text())["arguments"]


def load_checkpoint(checkpoint: Path, state: TrainState) -> None:
    """Puts a checkpoint's numbers into `state`, in place.

    Raises:
        ValueError: if the checkpoint's tensors are not those of this run.
    """
    record = json.loads((checkpoint / "state.json").read_text())
    tensors = load_file(checkpoint / "state.safetensors")
    state.update = record["update"]
    try:
        for role, role_optimizer in state.optimizers.items():
            _unpack_role(role, role_optimizer, tensors, record["scalars"])
        if state.ema is not None:
            for i, shadow in enumerate(state.ema.shadow_params):
                shadow.data.copy_(tensors[f"ema/{i}"])
            state.ema.optimization_step = record["scalars"]["ema"]
        state.statistics.state = {
            name.removeprefix(STATISTICS): value for name, value in tensors.items() if name.startswith(STATISTICS)
        }
        state.monitor.state = record["monitor"]
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint} does not fit this run ({error}); resume with the run's own arguments."
        ) from error


def _pack(state: TrainState) -> tuple[dict[str, Tensor], dict]:
    """All tensors under names like `student/optimizer/3/exp_avg`, and the numbers that are not tensors."""
    tensors: dict[str, Tensor] = {}
    scalars: dict = {}
    for role, role_optimizer in state.optimizers.items():
        for i, parameter in enumerate(role_optimizer.parameters):
            tensors[f"{role}/parameter/{i}"] = parameter.detach()
        for i, entries in role_optimizer.optimizer.state_dict()["state"].items():
            for name, value in _flat(entries):
                key = f"{role}/optimizer/{i}/{name}"
                (tensors if isinstance(value, Tensor) else scalars)[key] = value
    if state.ema is not None:
        tensors |= {f"ema/{i}": shadow for i, shadow in enumerate(state.ema.shadow_params)}
        scalars["ema"] = state.ema.optimization_step
    tensors |= {STATISTICS + name: value for name, value in state.statistics.state.items()}
    # Clones: tensors that share memory, as 8-bit optimisers' maps do, cannot be saved together.
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, scalars


def _flat(entries: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested entries, as bitsandbytes' quantised state is, under names like `quant_state/state1`."""
    for name, value in entries.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _unpack_role(role: str, role_optimizer: RoleOptimizer, tensors: dict[str, Tensor], scalars: dict) -> None:
    optimizer = role_optimizer.optimizer
    for i, parameter in enumerate(role_optimizer.parameters):
        parameter.data.copy_(tensors[f"{role}/parameter/{i}"])
    prefix = f"{role}/optimizer/"
    entries: dict[int, dict] = {}
    for key, value in (tensors | scalars).items():
        if key.startswith(prefix):
            index, *path, name = key.removeprefix(prefix).split("/")
            node = entries.setdefault(int(index), {})
            for step in path:
                node = node.setdefault(step, {})
            node[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
