"""Checkpoints: safetensors and JSON only, written aside, synced and renamed, so that a good one is never damaged."""

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
from ..folders import digest_of_file, sync
from ..sharding import gather, shard_like
from .checkpoint_files import PARTIAL, PREFIX, damage, put_in_place, read_record, rotate, tidy, write_record
from .monitor import Monitor
from .optimizers import RoleOptimizer, quantised_state

QUANTISED = {"codes", "scale", "qmap"}  # the parts of torchao's 8-bit tensors
STATISTICS = "statistics"


@dataclass
class TrainState:
    """All that an update changes. Random numbers need no state: they are keyed by the update (`Draws`)."""

    optimizers: dict[str, RoleOptimizer]  # of each trained role, with its parameters
    ema: EMAModel | None  # the student's moving average
    update: int = 0  # how many updates are done
    statistics: RunningMeans = field(default_factory=RunningMeans)  # of the method
    monitor: Monitor = field(default_factory=Monitor)  # the health numbers' memory
    saved: Path | None = None  # the checkpoint that was last written of it, or read into it


def save_checkpoint(
    folder: Path, state: TrainState, arguments: dict[str, Any], keep: int | None = None, writes: bool = True
) -> Path:
    """Writes `folder/checkpoint-<update>`, then removes the oldest beyond `keep`.

    A file for each role, with its parameters and its optimiser's state, one for the moving average, one for the running
    means, and `state.json`. It stays invisible until all of it is on the disk, and so does not harm one of that name.

    Args:
        folder: the run's.
        state: what an update changes.
        arguments: the run's, for `read_record`.
        keep: how many checkpoints stay, this one in any case; all by default.
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
        tidy(folder)
        partial.mkdir(parents=True)
        _write(partial, state, arguments)
        put_in_place(partial, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"The checkpoint {target} could not be written ({error}); the earlier ones are intact. Free some space and "
            "resume with --resume_from_checkpoint latest."
        ) from error
    state.saved = target
    rotate(target, keep)
    return target


def is_saved(folder: Path, state: TrainState, arguments: dict[str, Any]) -> bool:
    """Whether the folder's checkpoint of this update was written of this very state, or read into it, and is whole."""
    target = folder / f"{PREFIX}{state.update}"
    if state.saved is None or state.saved.resolve() != target.resolve() or damage(target) is not None:
        return False
    return bool(read_record(target)["arguments"] == json.loads(json.dumps(arguments)))


def _write(folder: Path, state: TrainState, arguments: dict[str, Any]) -> None:
    digests, scalars = {}, {}
    for name, tensors, numbers in _parts(state):
        path = folder / f"{name}.safetensors"
        save_file(tensors, path)
        digests[path.name], scalars[name] = digest_of_file(path), numbers
        sync(path)
    record = {"update": state.update, "digests": digests, "scalars": scalars, "monitor": state.monitor.state}
    write_record(folder, {**record, "arguments": arguments})
    sync(folder)


def load_checkpoint(checkpoint: Path, state: TrainState) -> None:
    """Puts a checkpoint's numbers into `state`, in place, on every process; ValueError if they are another run's."""
    try:
        record = read_record(checkpoint)
        scalars = record["scalars"]
        for role, role_optimizer in state.optimizers.items():
            _unpack_role(role_optimizer, load_file(checkpoint / f"{role}.safetensors"), scalars[role])
        if state.ema is not None:
            averages = load_file(checkpoint / "ema.safetensors")
            for i, shadow in enumerate(state.ema.shadow_params):
                copy_into(shadow, averages[str(i)])
            state.ema.optimization_step = scalars["ema"]["optimization_step"]
        state.statistics.state = load_file(checkpoint / f"{STATISTICS}.safetensors")
    except (KeyError, RuntimeError, FileNotFoundError) as error:
        raise ValueError(
            f"{checkpoint} does not fit this run ({error}); resume with the run's own arguments."
        ) from error
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{checkpoint} is damaged ({error}); resume from an earlier checkpoint.") from error
    state.monitor.state = record["monitor"]
    state.update, state.saved = record["update"], checkpoint


def copy_into(parameter: Tensor, tensor: Tensor) -> None:
    """Copies a whole tensor into a parameter, or its shards; RuntimeError if the shapes differ (no broadcasting)."""
    if tensor.shape != parameter.shape:
        raise RuntimeError(f"a tensor is {list(tensor.shape)} there, and {list(parameter.shape)} in the network")
    parameter.data.copy_(shard_like(tensor, parameter))


def _parts(state: TrainState, keep_tensors: bool = True) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Any]]]:
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
    whole = ((name, gather(tensor.detach())) for name, tensor in tensors.items())  # every process gathers
    return {name: tensor.cpu().clone().contiguous() for name, tensor in whole if keep}


def _flat(entries: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested entries, as the 8-bit optimisers' are, under names like `quant_state/state1` or `exp_avg/codes`."""
    for name, value in entries.items():
        if hasattr(value, "qmap"):
            value = {part: getattr(value, part) for part in QUANTISED}
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _unpack_role(role_optimizer: RoleOptimizer, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    parameters, optimizer = role_optimizer.parameters, role_optimizer.optimizer
    if sum(name.startswith("parameter/") for name in tensors) != len(parameters):
        raise KeyError(f"the role has {len(parameters)} parameters, and another number there")
    for i, parameter in enumerate(parameters):
        copy_into(parameter, tensors[f"parameter/{i}"])
    entries: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | scalars).items():
        kind, index, *path = key.split("/")
        if kind != "optimizer":
            continue
        node = entries.setdefault(int(index), {})
        for step in path[:-1]:
            node = node.setdefault(step, {})
        node[path[-1]] = shard_like(value, parameters[int(index)]) if isinstance(value, Tensor) else value
    for entry in entries.values():
        for name, value in entry.items():
            if isinstance(value, dict) and value.keys() == QUANTISED:
                entry[name] = quantised_state(value)
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
