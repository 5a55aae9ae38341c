"""What a training step costs in relation to its floor, the network calls that it needs.

    python benchmarks/throughput.py --work_dir throughput

A pair is one update of the real loop and the bare calls of the same networks on the same samples, in one process and
in alternating order. A ratio is the median over pairs. `cpu` is processor time, which other programs do not lengthen.
The floor's adapters are peft's, unfolded. `without_adapters` is the base network alone, whose backward goes to its
input: the least that any LoRA on all layers needs. On a GPU, SDXL, SD3.5-large and FLUX.1 with random weights follow.
`--small` tries their code with small networks on any machine and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from runs import row_of_process, write_result
from step_cost import Cost, Run, command_line, cost, make_run, save_teacher, software
from torch import Tensor, nn

from rdm_diffusers.families import Conditioning, load_denoiser
from rdm_diffusers.networks import FAKE_SCORE, STUDENT, TEACHER, SharedBase
from rdm_diffusers.training.batches import Batch, collect
from rdm_diffusers.training.tracking import peak_memory

Inputs = tuple[Tensor, Tensor, Conditioning]
WARM_UP = 2
TINY: dict[str, Any] = dict(
    teacher_target="score", train_batch_size=64, group_size=4, num_student_steps=4, steps_per_rollout=4,
    guidance_scale=2.0, rank=16, fold_adapters=False, lr_scheduler="constant",
)  # fmt: skip
FULL = dict(rank=None, fold_adapters=None)
MAIN: dict[str, dict[str, Any]] = {"lora": {}, "lora_folded": {"fold_adapters": True}, "full": FULL}
GROWTH: dict[str, dict[str, Any]] = {
    **{f"group_{size}": {"group_size": size} for size in (4, 8, 16)},
    **{f"steps_{k}": {"num_student_steps": k, "steps_per_rollout": 1} for k in (1, 2, 4, 8)},
    **{f"steps_{k}_all_trained": {"num_student_steps": k, "steps_per_rollout": k} for k in (1, 2, 4, 8)},
    **{f"resolution_{pixels}": {"resolution": pixels, "train_batch_size": 32} for pixels in (32, 64)},
}
LARGE: dict[str, dict[str, Any]] = {"sdxl": {}, "sd35_large": {}, "flux": {}, "sdxl_full": {}}
LARGE_FLAGS: dict[str, Any] = dict(
    mixed_precision="bf16", gradient_checkpointing=True, use_8bit_adam=True, train_batch_size=1, group_size=4,
    gradient_accumulation_steps=4, num_student_steps=4, steps_per_rollout=1, guidance_scale=4.5,
)  # fmt: skip


def main() -> None:
    args = parse()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.row:
        print(json.dumps(measure_row(args)))
        return
    record: dict[str, Any] = {"software": software()}
    if not args.small:
        record["tiny"] = {name: tiny_row(args, name, args.repeats) for name in MAIN}
        record["growth"] = {name: tiny_row(args, name, args.growth_repeats) for name in GROWTH}
        record["processes"] = {str(count): processes_row(args, count) for count in (1, 2)}
    if args.small or torch.cuda.is_available():
        record["large"] = {name: subprocess_row(args, name) for name in LARGE}
    if args.small:
        print(json.dumps(record, indent=2))
    else:
        write_result("throughput", record)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="scratch")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of the three main rows")
    parser.add_argument(
        "--growth_repeats", type=int, default=5, help="pairs of each row on growth; large models' steps"
    )
    parser.add_argument("--small", action="store_true", help="only the large models, shrunken; writes nothing")
    parser.add_argument("--row", help="measure one row and print it; for the script itself")
    return parser.parse_args()


def measure_row(args: argparse.Namespace) -> dict[str, Any]:
    """The row of this process."""
    return measure_process(args) if args.row == "process" else measure_large(args, args.row)


def tiny_row(args: argparse.Namespace, name: str, repeats: int) -> dict[str, Any]:
    """A row of the embedded tiny teacher: an update's cost, its floor's, and their ratio."""
    flags, student = {**TINY, **{**MAIN, **GROWTH}[name]}, "full" if name == "full" else "lora"
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        run = make_run(command_line("tiny", Path(folder), **flags), student)
        unfolded = run
        if flags["fold_adapters"]:
            unfolded = make_run(command_line("tiny", Path(folder) / "twin", **{**flags, "fold_adapters": False}))
        bare = load_denoiser("tiny", torch.float32).eval().requires_grad_(False) if student == "lora" else None
        pairs = [measure_pair(run, unfolded, bare, floor_first=i % 2 == 1) for i in range(WARM_UP + repeats)][WARM_UP:]
    changed = {key: value for key, value in flags.items() if TINY.get(key) != value and value is not None}
    row = {"changed": changed, "repeats": repeats, **summary(pairs)}
    print(name, json.dumps(row), flush=True)
    return row


def measure_pair(run: Run, unfolded: Run, bare: nn.Module | None, floor_first: bool) -> dict[str, Any]:
    """The costs of one update and of its floors."""
    batch = collect_whole(run, run.state.update)
    found: dict[str, Any] = {}
    for part in ("floor", "step") if floor_first else ("step", "floor"):
        if part == "step":
            found["step"] = cost(run.update)
        else:
            found["floor"] = {
                name: cost(lambda calls=calls: list(calls)) for name, calls in floor(unfolded, batch).items()
            }
    if bare is not None:
        calls = floor(unfolded, batch, bare).items()
        found["without_adapters"] = {name: cost(lambda calls=calls: list(calls)) for name, calls in calls}
    return found


def collect_whole(run: Run, number: int) -> Batch:
    """A batch together with all the steps of its rollout, as importance weights need them."""
    return collect(replace(run.distillation, importance_weighting="clipped"), number)


def floor(run: Run, batch: Batch, bare: nn.Module | None = None) -> dict[str, Iterator[None]]:
    """The network calls that an update needs, by their purpose; iterating over them computes them.

    Args:
        run: whose networks are called, with the adapters unfolded.
        batch: the samples, with their rollout.
        bare: a network that is called for every role instead; its backward goes to its input.
    """
    size, updates = run.config.optimisation.train_batch_size, run.config.method.fake_updates_per_step
    rollout = batch.rollout
    states = [(step.x_t, step.times, rollout.conditioning) for step in rollout.steps]
    samples = [(s.x_t, s.t, s.conditioning) for s in (batch.samples[p] for p in batch.samples.micro_batches(size))]
    guided = [twice(run, inputs) for inputs in samples] if run.networks.guidance_scale != 1 else samples
    plan = {
        "rollout": (STUDENT, [part for state in states for part in parts(state, size)], False),
        "teacher": (TEACHER, guided, False),
        "fake_score": (FAKE_SCORE, samples, False),
        "student_forward_backward": (STUDENT, samples, True),
        "fake_score_forward_backward": (FAKE_SCORE, samples * updates, True),
    }
    return {name: calls(run, bare, *what) for name, what in plan.items()}


def calls(run: Run, bare: nn.Module | None, role: str, inputs: list[Inputs], backward: bool) -> Iterator[None]:
    """Calls a role's network on each input, and clears the gradients once they are all done."""
    networks = run.networks
    own = networks.denoiser if isinstance(networks, SharedBase) else networks.denoisers[role]
    for x_t, t, conditioning in inputs:
        start = x_t.detach().requires_grad_(backward and bare is not None)
        with networks.acting_as(role), torch.set_grad_enabled(backward):
            output = networks.family.denoise(bare or own, start, t, conditioning)
            if backward:
                output.backward(torch.ones_like(output))
        yield
    for parameter in networks.parameters(role):
        parameter.grad = None


def parts(state: Inputs, size: int) -> list[Inputs]:
    """A rollout's state in micro-batches."""
    x_t, t, conditioning = state
    slices = [slice(start, start + size) for start in range(0, len(x_t), size)]
    return [(x_t[part], t[part], conditioning[part]) for part in slices]


def twice(run: Run, inputs: Inputs) -> Inputs:
    """With and without the prompt, as a guided teacher is called."""
    x_t, t, conditioning = inputs
    both = Conditioning.cat([run.networks.null_conditioning.expand(len(x_t)), conditioning])
    return torch.cat([x_t, x_t]), torch.cat([t, t]), both


def summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the pairs, for both clocks."""
    found: dict[str, Any] = {}
    for clock in ("wall", "cpu"):
        steps = [getattr(pair["step"], clock) for pair in pairs]
        row: dict[str, Any] = {"step_seconds": median(steps)}
        for kind in ("floor", "without_adapters"):
            if kind in pairs[0]:
                totals = [sum(getattr(part, clock) for part in pair[kind].values()) for pair in pairs]
                ratios = [step / total for step, total in zip(steps, totals, strict=True)]
                row[f"{kind}_seconds"] = {"all": median(totals), **by_part(pairs, kind, clock)}
                row[f"ratio_to_{kind}"] = {"median": median(ratios), "quartiles": quantiles(ratios, n=4)[::2]}
        found[clock] = row
    return found


def by_part(pairs: list[dict[str, Any]], kind: str, clock: str) -> dict[str, float]:
    """The median of each part of a floor."""
    return {name: median(getattr(pair[kind][name], clock) for pair in pairs) for name in pairs[0][kind]}


def processes_row(args: argparse.Namespace, count: int) -> dict[str, Any]:
    """The main LoRA row by several processes of 32 samples each, over gloo on this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return started(args, "process", launch, environment)


def measure_process(args: argparse.Namespace) -> dict[str, Any]:
    """An update's cost on this process, which is one of several."""
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        run = make_run(command_line("tiny", Path(folder), **{**TINY, "train_batch_size": 32}))
        costs = [cost(run.update) for _ in range(WARM_UP + args.growth_repeats)][WARM_UP:]
    if rank:
        sys.exit()
    seconds = median(one.wall for one in costs)
    pictures = count * len(run.distillation.groups(0)) * run.config.method.group_size
    return {"step_seconds": seconds, "step_cpu_seconds": median(one.cpu for one in costs),
            "rollouts_per_second": pictures / seconds, "cpus": os.cpu_count()}  # fmt: skip


def subprocess_row(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A large model's row, from a process of its own, so that no other row used its memory."""
    return started(args, name, [sys.executable], dict(os.environ))


def started(args: argparse.Namespace, row: str, launch: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Runs this script for one row; the last line that it prints is the row."""
    own = [str(Path(__file__)), "--work_dir", str(args.work_dir), "--row", row]
    own += ["--growth_repeats", str(args.growth_repeats), *(["--small"] if args.small else [])]
    result = row_of_process([*launch, *own], environment)
    if "failed" not in result:
        print(row, json.dumps(result), flush=True)
    return result


def measure_large(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Peak memory and seconds of a step of a large model with random weights."""
    teacher, student = name.removesuffix("_full"), "full" if name.endswith("_full") else "lora"
    own = dict(rank=64 if not args.small else 4) if student == "lora" else {}
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        source = save_teacher(teacher, Path(folder) / "teacher", torch.bfloat16, args.small)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        resolution = 64 if args.small else 1024
        run = make_run(command_line(source, Path(folder), resolution=resolution, **LARGE_FLAGS, **own), student)
        costs: list[Cost] = [cost(run.update) for _ in range(1 + args.growth_repeats)][1:]
    parameters = sum(parameter.numel() for parameter in run.teacher.denoiser.parameters())
    return {
        "step_seconds": median(one.wall for one in costs),
        "peak_gib": peak_memory(run.accelerator.device) / 2**30,
        "million_parameters_with_adapters": parameters / 1e6,
        "flags": {"resolution": resolution, **LARGE_FLAGS, **own},
    }


if __name__ == "__main__":
    main()
