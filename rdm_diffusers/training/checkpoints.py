"""Checkpoints: safetensors and JSON only, written aside, synced and renamed, so that a good one is never damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..distillation import RunningMeans
from ..sharding import spread_like, whole
from .monitor import Monitor
from .optimizers import RoleOptimizer, quantised_state

PREFIX, PARTIAL, OLD = "checkpoint-", ".partial-", ".old-"
QUANTISED = {"codes", "scale", "qmap"}  # the parts of torchao's 8-bit tensors
RECORD, STATISTICS = "state.json", "statistics"


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


def save_checkpoint(
    folder: Path, state: TrainState, arguments: dict, keep: int | None = None, writes: bool = True
) -> Path:
    """Writes `folder/checkpoint-<update>`, then removes the oldest beyond `keep`.

    A file for each role, with its parameters and its optimiser's state, one for the moving average, one for the running
    means, and `state.json`. It stays invisible until all of it is on the disk.

    Args:
        folder: the run's.
        state: what an update changes.
        arguments: the run's, for `read_arguments`.
        keep: how many checkpoints stay; all by default.
        writes: whether this process does. All must call where weights are sharded, to put them together; one writes.

    Raises:
        OSError: if it cannot be written, for example on a full disk; earlier checkpoints are untouched then.
    """
    target = folder / f"{PREFIX}{state.update}"
    if not writes:
        for _ in _parts(state, keep_tensors=False):
            pass
        return target
    partial = folder / f"{PARTIAL}{target.name}"
    try:
        _clear(folder)
        partial.mkdir(parents=True)
        _write(partial, state, arguments)
        if target.exists():
            _remove(target)
        partial.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"The checkpoint {target} could not be written ({error}); the earlier ones are intact. Free some space and "
            "resume with --resume_from_checkpoint latest."
        ) from error
    for old in list_checkpoints(folder)[: -keep if keep else 0]:
        _remove(old)
    return target


def _clear(folder: Path) -> None:
    """Removes what a killed run left half written or half removed."""
    for left in [*folder.glob(f"{PARTIAL}*"), *folder.glob(f"{OLD}*")]:
        shutil.rmtree(left)


def _remove(checkpoint: Path) -> None:
    """Hides a checkpoint before its files go, so that none is ever seen half removed."""
    aside = checkpoint.with_name(OLD + checkpoint.name)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def _write(folder: Path, state: TrainState, arguments: dict) -> None:
    digests, scalars = {}, {}
    for name, tensors, numbers in _parts(state):
        path = folder / f"{name}.safetensors"
        save_file(tensors, path)
        digests[path.name], scalars[name] = _digest(path), numbers
        _sync(path)
    record = {"update": state.update, "digests": digests, "scalars": scalars, "monitor": state.monitor.state}
    (folder / RECORD).write_text(json.dumps({**record, "arguments": arguments}, indent=1))
    _sync(folder / RECORD)
    _sync(folder)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; not a user's copies of them like `checkpoint-best`."""
    numbers = {path: path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*") if (path / RECORD).exists()}
    return sorted((path for path in numbers if numbers[path].isdecimal()), key=lambda path: int(numbers[path]))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if they are as they were written."""
    try:
        digests = json.loads((checkpoint / RECORD).read_text())["digests"]
        changed = [name for name, digest in digests.items() if _digest(checkpoint / name) != digest]
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(changed)} changed since it was written" if changed else None


def find_checkpoint(folder: Path, name: str) -> Path:
    """The checkpoint that `--resume_from_checkpoint` names: `latest`, a name in `folder`, or a path.

    `latest` passes over damaged ones, with a warning.

    Raises:
        ValueError: if there is none, or the one that was named is damaged.
    """
    if name == "latest":
        return _newest_whole(folder)
    for path in (folder / name, Path(name)):
        if (path / RECORD).exists():
            problem = damage(path)
            if problem:
                raise ValueError(f"{path} is damaged ({problem}); resume from an earlier checkpoint, or from `latest`.")
            return path
    raise ValueError(f"--resume_from_checkpoint {name} is no checkpoint; use `latest` or a checkpoint-N folder.")


def _newest_whole(folder: Path) -> Path:
    found = list_checkpoints(folder)
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(f"{path} is damaged ({problem}); the checkpoint before it is used.", stacklevel=3)
    what = "undamaged checkpoint" if found else "checkpoint"
    raise ValueError(f"There is no {what} in {folder} to resume from; leave --resume_from_checkpoint out.")


def read_arguments(checkpoint: Path) -> dict:
    """The arguments of the run that wrote a checkpoint."""
    return json.loads((checkpoint / RECORD).read_text())["arguments"]


def updates_of(checkpoint: Path) -> int:
    """How many updates were done when a checkpoint was written."""
    return json.loads((checkpoint / RECORD).read_text())["update"]


def load_checkpoint(checkpoint: Path, state: TrainState) -> None:
    """Puts a checkpoint's numbers into `state`, in place; on every process alike.

    Raises:
        ValueError: if the checkpoint's tensors are not those of this run.
    """
    record = json.loads((checkpoint / RECORD).read_text())
    scalars = record["scalars"]
    try:
        for role, role_optimizer in state.optimizers.items():
            _unpack_role(role_optimizer, load_file(checkpoint / f"{role}.safetensors"), scalars[role])
        if state.ema is not None:
            averages = load_file(checkpoint / "ema.safetensors")
            for i, shadow in enumerate(state.ema.shadow_params):
                shadow.data.copy_(spread_like(averages[str(i)], shadow))
            state.ema.optimization_step = scalars["ema"]["optimization_step"]
    except (KeyError, RuntimeError, FileNotFoundError) as error:
        raise ValueError(
            f"{checkpoint} does not fit this run ({error}); resume with the run's own arguments."
        ) from error
    state.statistics.state = load_file(checkpoint / f"{STATISTICS}.safetensors")
    state.monitor.state = record["monitor"]
    state.update = record["update"]


def _parts(state: TrainState, keep_tensors: bool = True) -> Iterator[tuple[str, dict[str, Tensor], dict]]:
    """A checkpoint's files one after another: name, tensors (on the CPU), and the numbers that are not tensors."""
    for role, role_optimizer in state.optimizers.items():
        named = {f"parameter/{i}": p.detach() for i, p in enumerate(role_optimizer.parameters)}
        for i, entries in role_optimizer.optimizer.state_dict()["state"].items():
            named |= {f"optimizer/{i}/{name}": value for name, value in _flat(entries)}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        yield role, _on_cpu(tensors, keep_tensors), {n: v for n, v in named.items() if n not in tensors}
    if state.ema is not None:
        shadows = {str(i): shadow for i, shadow in enumerate(state.ema.shadow_params)}
        yield "ema", _on_cpu(shadows, keep_tensors), {"optimization_step": state.ema.optimization_step}
    yield STATISTICS, _on_cpu(state.statistics.state, keep_tensors), {}


def _on_cpu(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole copies: tensors that share memory, as 8-bit optimisers' maps do, cannot be saved together."""
    copies = {}
    for name, tensor in tensors.items():
        put_together = whole(tensor.detach())
        if keep:
            copies[name] = put_together.cpu().clone().contiguous()
    return copies


def _flat(entries: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested entries, as the 8-bit optimisers' are, under names like `quant_state/state1` or `exp_avg/codes`."""
    for name, value in entries.items():
        if hasattr(value, "qmap"):
            value = {part: getattr(value, part) for part in QUANTISED}
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _unpack_role(role_optimizer: RoleOptimizer, tensors: dict[str, Tensor], scalars: dict) -> None:
    parameters, optimizer = role_optimizer.parameters, role_optimizer.optimizer
    for i, parameter in enumerate(parameters):
        parameter.data.copy_(spread_like(tensors[f"parameter/{i}"], parameter))
    entries: dict[int, dict] = {}
    for key, value in (tensors | scalars).items():
        kind, index, *path = key.split("/")
        if kind != "optimizer":
            continue
        node = entries.setdefault(int(index), {})
        for step in path[:-1]:
            node = node.setdefault(step, {})
        node[path[-1]] = spread_like(value, parameters[int(index)]) if isinstance(value, Tensor) else value
    for entry in entries.values():
        for name, value in entry.items():
            if isinstance(value, dict) and value.keys() == QUANTISED:
                entry[name] = quantised_state(value)
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
