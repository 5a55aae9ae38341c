"""Checkpoints: safetensors and JSON only, written aside, synced and renamed, so that a good one is never damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..distillation import RunningMeans
from ..folders import digest_of_file, sync
from ..report.rows import Row
from ..sharding import gather, shard_like
from .checkpoint_files import PARTIAL, PREFIX, damage, put_in_place, read_part, read_record, rotate, tidy, write_record
from .monitor import Monitor
from .optimizers import RoleOptimizer, load_states, quantised_state

PIECE = 2**32  # bytes of tensors in a file, about; a process copies so much at once
QUANTISED = {"codes", "scale", "qmap"}  # the parts of torchao's tensors of few bits
STATISTICS = "statistics"
SCALER = "scaler/"  # the numbers of a role's loss scaler begin with it


@dataclass
class TrainState:
    """All that an update changes. Random numbers need no state: they are keyed by the update (`Draws`)."""

    optimizers: dict[str, RoleOptimizer]  # of each trained role, with its parameters
    ema: EMAModel | None  # the student's moving average
    update: int = 0  # how many updates are done
    statistics: RunningMeans = field(default_factory=RunningMeans)  # of the method
    monitor: Monitor = field(default_factory=Monitor)  # the health numbers' memory
    metrics: list[Row] = field(default_factory=list)  # of every validation with metrics so far
    saved: Path | None = None  # the checkpoint that was last written of it, or read into it


def save_checkpoint(
    folder: Path,
    state: TrainState,
    arguments: dict[str, Any],
    keep: int | None = None,
    team: Accelerator | None = None,
    name: str | None = None,
) -> Path:
    """Writes `folder/checkpoint-<update>`, then removes the oldest beyond `keep`.

    A file for each role, with its parameters and its optimiser's state, one for the moving average, one for the running
    means, and `state.json`. Large ones are cut into pieces `NAME-00001-of-00003.safetensors`. All hold whole tensors.
    It stays invisible until all of it is on the disk, and so does not harm one of that name.

    Args:
        folder: the run's.
        state: what an update changes.
        arguments: the run's, for `read_record`.
        keep: how many checkpoints stay, this one in any case; all by default.
        team: the processes that share the weights' shards. All of them must call, and write the pieces in turn; by
            default this one writes alone.
        name: another name for the folder, such as `checkpoint-best`; then none is removed.

    Raises:
        OSError: if it cannot be written, for example on a full disk; earlier checkpoints are untouched then.
    """
    target = folder / (name or f"{PREFIX}{state.update}")
    partial = folder / f"{PARTIAL}{target.name}"
    leads = team is None or team.is_main_process
    try:
        if leads:
            tidy(folder)
            partial.mkdir(parents=True)
        record = _write(partial, state, team)
        if leads:
            write_record(partial, {**record, "arguments": arguments})
            sync(partial)
            put_in_place(partial, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"The checkpoint {target} could not be written ({error}); the earlier ones are intact. Free some space and "
            "resume with --resume_from_checkpoint latest."
        ) from error
    if name is not None:
        return target
    state.saved = target
    if leads:
        rotate(target, keep)
    return target


def is_saved(folder: Path, state: TrainState, arguments: dict[str, Any]) -> bool:
    """Whether the folder's checkpoint of this update was written of this very state, or read into it, and is whole."""
    target = folder / f"{PREFIX}{state.update}"
    if state.saved is None or state.saved.resolve() != target.resolve() or damage(target) is not None:
        return False
    return bool(read_record(target)["arguments"] == json.loads(json.dumps(arguments)))


def _write(folder: Path, state: TrainState, team: Accelerator | None) -> dict[str, Any]:
    """Writes the files, each process every `num_processes`-th; returns the record of all of them."""
    index, count = (0, 1) if team is None else (team.process_index, team.num_processes)
    if team is not None:
        team.wait_for_everyone()  # until there is the folder
    pieces = list(_pieces(state))
    digests: dict[str, str] = {}
    for start in range(0, len(pieces), count):
        digests |= _write_one_of(pieces[start : start + count], index, folder)
    if team is not None:
        digests = {name: digest for each in gather_object([digests]) for name, digest in each.items()}
    scalars = {name: numbers for name, _, numbers in _parts(state)}
    memory = {"monitor": state.monitor.state, **({"metrics": state.metrics} if state.metrics else {})}
    return {"update": state.update, "digests": digests, "scalars": scalars, **memory}


def _write_one_of(pieces: list[tuple[str, dict[str, Tensor]]], index: int, folder: Path) -> dict[str, str]:
    """All processes gather each piece, then each writes the one of its index, if there is one; its name and digest."""
    kept = [_on_cpu(tensors, i == index) for i, (_, tensors) in enumerate(pieces)]
    if index >= len(pieces):
        return {}
    path = folder / f"{pieces[index][0]}.safetensors"
    save_file(kept[index], path)
    sync(path)
    return {path.name: digest_of_file(path)}


def load_checkpoint(checkpoint: Path, state: TrainState) -> None:
    """Puts a checkpoint's numbers into `state`, in place, on every process; ValueError if they are another run's."""
    try:
        record = read_record(checkpoint)
        scalars = record["scalars"]
        for role, role_optimizer in state.optimizers.items():
            _unpack_role(role_optimizer, read_part(checkpoint, role), scalars[role])
        if state.ema is not None:
            averages = read_part(checkpoint, "ema")
            for i, shadow in enumerate(state.ema.shadow_params):
                copy_into(shadow, averages[str(i)])
            state.ema.optimization_step = scalars["ema"]["optimization_step"]
        state.statistics.state = read_part(checkpoint, STATISTICS)
    except (KeyError, RuntimeError, FileNotFoundError) as error:
        raise ValueError(
            f"{checkpoint} does not fit this run ({error}); resume with the run's own arguments."
        ) from error
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{checkpoint} is damaged ({error}); resume from an earlier checkpoint.") from error
    state.monitor.state, state.metrics = record["monitor"], record.get("metrics", [])
    state.update, state.saved = record["update"], checkpoint


def copy_into(parameter: Tensor, tensor: Tensor) -> None:
    """Copies a whole tensor into a parameter, or its shards; RuntimeError if the shapes differ (no broadcasting)."""
    if tensor.shape != parameter.shape:
        raise RuntimeError(f"a tensor is {list(tensor.shape)} there, and {list(parameter.shape)} in the network")
    parameter.data.copy_(shard_like(tensor, parameter))


def _pieces(state: TrainState) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """A checkpoint's files one after another: name, and tensors where they are."""
    for name, tensors, _ in _parts(state):
        pieces: list[dict[str, Tensor]] = [{}]
        size = 0
        for key, tensor in tensors.items():
            size += tensor.nbytes
            if size > PIECE and pieces[-1]:
                pieces.append({})
                size = tensor.nbytes
            pieces[-1][key] = tensor
        for i, piece in enumerate(pieces):
            yield name if len(pieces) == 1 else f"{name}-{i + 1:05}-of-{len(pieces):05}", piece


def _parts(state: TrainState) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Any]]]:
    """A checkpoint's parts one after another: name, tensors where they are, and the numbers that are not tensors."""
    for role, role_optimizer in state.optimizers.items():
        named = {f"parameter/{i}": p.detach() for i, p in enumerate(role_optimizer.parameters)}
        for i, entries in role_optimizer.optimizer.state_dict()["state"].items():
            named |= {f"optimizer/{i}/{name}": value for name, value in _flat(entries)}
        if role_optimizer.scaler is not None:
            named |= {f"{SCALER}{name}": value for name, value in role_optimizer.scaler.state_dict().items()}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        yield role, tensors, {n: v for n, v in named.items() if n not in tensors}
    if state.ema is not None:
        shadows = {str(i): shadow for i, shadow in enumerate(state.ema.shadow_params)}
        yield "ema", shadows, {"optimization_step": state.ema.optimization_step}
    yield STATISTICS, state.statistics.state, {}


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
    parameters, scaler = role_optimizer.parameters, role_optimizer.scaler
    if scaler is not None:
        scaler.load_state_dict({k.removeprefix(SCALER): v for k, v in scalars.items() if k.startswith(SCALER)})
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
    for index, entry in entries.items():
        for name, value in entry.items():
            if isinstance(value, dict) and value.keys() == QUANTISED:
                entry[name] = quantised_state(value, parameters[index].shape)
    load_states(role_optimizer.optimizer, entries)
