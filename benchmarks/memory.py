"""The peak memory of one real update, for several layouts of the three roles and settings of a run.

    python benchmarks/memory.py --work_dir memory

Every row is a process of its own. It first trains the tiny teacher for an update, which loads the libraries; the
memory that is resident then is subtracted. The optimisers' states are made before the measured update, by a step with
zero gradients, because they exist from the second update on. The peak is the kernel's highest resident memory during
the update, on a GPU torch's highest allocated memory; the passing memory of loading is not part of it. Layouts:

- shared: one base with two LoRAs, `train_rdm_lora.py`
- three_copies: a base for each role, with a LoRA on the student's and on the fake score's
- full_fake: a LoRA student on the teacher's base, and a fake score of full float32 weights
- full: `train_rdm_full.py`, three networks with full weights
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory
from runs import row_of_process, write_result
from step_cost import Run, command_line, cost, make_run, save_teacher, software

from rdm_diffusers.adapters import add_adapters
from rdm_diffusers.config import RunConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.families import Conditioning, Teacher, load_denoiser
from rdm_diffusers.networks import FAKE_SCORE, STUDENT, TEACHER, SeparateNetworks, SharedBase
from rdm_diffusers.training.assembly import DTYPES, lora_config, networks_of_run
from rdm_diffusers.training.devices import place, prepare_denoiser
from rdm_diffusers.training.memory_plan import plan_memory

GIB = 2**30
COMMON: dict[str, Any] = dict(
    resolution=128, train_batch_size=1, gradient_accumulation_steps=4, group_size=4, num_student_steps=2,
    steps_per_rollout=1, guidance_scale=7.5, rank=64, gradient_checkpointing=True,
)  # fmt: skip
SD15 = {"resolution": 256, "num_student_steps": 1}
# row -> the network's name, the layout, and the flags that differ from the common ones
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mid shared": ("sd_mid", "shared", {}),
    "mid three_copies": ("sd_mid", "three_copies", {}),
    "mid full_fake": ("sd_mid", "full_fake", {}),
    "mid full": ("sd_mid", "full", {}),
    "mid full, 8-bit Adam, no EMA": ("sd_mid", "full", {"use_8bit_adam": True, "use_ema": False}),
    "mid group 4 in fours": ("sd_mid", "shared", {"train_batch_size": 4, "gradient_accumulation_steps": 1}),
    "mid group 16 in fours": ("sd_mid", "shared", {"train_batch_size": 4, "group_size": 16}),
    "mid shared, 8-bit Adam": ("sd_mid", "shared", {"use_8bit_adam": True}),
    "mid shared, no EMA": ("sd_mid", "shared", {"use_ema": False}),
    "mid shared, bf16": ("sd_mid", "shared", {"mixed_precision": "bf16"}),
    "mid shared, int8": ("sd_mid", "shared", {"base_quantization": "int8"}),
    "mid shared, no checkpointing": ("sd_mid", "shared", {"gradient_checkpointing": None}),
    "mid shared, folded": ("sd_mid", "shared", {"gradient_checkpointing": None, "fold_adapters": True}),
    **{f"mid {k} steps": ("sd_mid", "shared", {"num_student_steps": k}) for k in (1, 4, 8)},
    "mid 256 px": ("sd_mid", "shared", {"resolution": 256}),
    "mid 512 px": ("sd_mid", "shared", {"resolution": 512}),
    "sd15 shared": ("sd15", "shared", SD15),
    "sd15 three_copies": ("sd15", "three_copies", SD15),
    "sd15 shared, rank 16": ("sd15", "shared", {**SD15, "rank": 16}),
    "sd15 three_copies, rank 16": ("sd15", "three_copies", {**SD15, "rank": 16}),
    "sd15 shared, 8-bit Adam": ("sd15", "shared", {**SD15, "use_8bit_adam": True}),
    "sd15 three_copies, 8-bit Adam": ("sd15", "three_copies", {**SD15, "use_8bit_adam": True}),
    "sd15 full_fake": ("sd15", "full_fake", SD15),
    "sd15 full": ("sd15", "full", SD15),
}
# ratio -> the rows' names, and its target, an upper limit
RATIOS: dict[str, tuple[str, str, float | None]] = {
    "shared / three_copies, sd15": ("sd15 shared", "sd15 three_copies", 0.45),
    "shared / three_copies, sd15, rank 16": ("sd15 shared, rank 16", "sd15 three_copies, rank 16", 0.45),
    "shared / three_copies, sd15, 8-bit Adam": ("sd15 shared, 8-bit Adam", "sd15 three_copies, 8-bit Adam", 0.45),
    "shared / full_fake, sd15": ("sd15 shared", "sd15 full_fake", None),
    "shared / three_copies, mid": ("mid shared", "mid three_copies", None),
    "shared / full_fake, mid": ("mid shared", "mid full_fake", None),
    "shared / full, mid": ("mid shared", "mid full", None),
    "group 16 / group 4, micro-batches of 4": ("mid group 16 in fours", "mid group 4 in fours", 1.1),
    "8 steps / 1 step": ("mid 8 steps", "mid 1 steps", None),
}
PHASES = ("rollouts and R_dm", "forward and backward", "optimiser's step")  # of an update, in the plan
# Float32 numbers per parameter of a network, roughly, for rows that a machine cannot hold.
NUMBERS = {"shared": 2, "three_copies": 3.6, "full_fake": 5, "full": 9.5}
MILLIONS = {"sd_mid": 80, "sd15": 860}
# Freed memory goes back to the system at once, so that the peak counts needed memory only.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def main() -> None:
    args = parse()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.row:
        print(json.dumps(measure(args, args.row)))
        return
    chosen = [name for name in ROWS if args.only in name]
    for name in {ROWS[row][0] for row in chosen}:
        if not (teacher_folder(args, name) / "model_index.json").exists():
            save_teacher(name, teacher_folder(args, name), small=args.small)
    rows = {name: row_of(args, name) for name in chosen}
    record = {"software": software(), "common": COMMON, "ratios": ratios(rows), "rows": rows}
    if args.small or args.only:
        print(json.dumps(record, indent=2))
    else:
        write_result("memory", record)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="teachers and finished rows, which are kept")
    parser.add_argument("--only", default="", help="only the rows whose names hold this; writes no result")
    parser.add_argument("--small", action="store_true", help="shrunken networks, to try the script; writes no result")
    parser.add_argument("--row", help="measure one row and print it; for the script itself")
    return parser.parse_args()


def teacher_folder(args: argparse.Namespace, name: str) -> Path:
    """Where a teacher with random weights is."""
    return args.work_dir / (f"{name}-small" if args.small else name)


def row_of(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A row, measured by a process of its own unless an earlier command did, beside what was planned."""
    row = {**measured(args, name), **planned(args, name)}
    print(name, json.dumps(row), flush=True)
    return row


def measured(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The kept row, or else a new one, unless this machine cannot hold it."""
    network, layout, changes = ROWS[name]
    about = {"network": network, "layout": layout, "changes": changes}
    kept = args.work_dir / f"{name.replace(', ', '-').replace(' ', '_')}{'-small' if args.small else ''}.json"
    if kept.exists():
        return about | json.loads(kept.read_text())
    needed = NUMBERS[layout] * MILLIONS[network] * 4e6
    if not args.small and not torch.cuda.is_available() and needed > psutil.virtual_memory().available:
        return about | {"not_run": f"would need about {needed / GIB:.0f} GiB"}
    own = [sys.executable, str(Path(__file__)), "--work_dir", str(args.work_dir), "--row", name]
    row = row_of_process([*own, *(["--small"] if args.small else [])], {**os.environ, **MALLOC})
    if "failed" not in row:
        kept.write_text(json.dumps(row))
    return about | row


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Peaks over peaks, of the rows that were measured."""
    found = {}
    for name, (over, under, target) in RATIOS.items():
        peaks = [rows.get(row, {}).get("peak_gib") for row in (over, under)]
        if all(peaks):
            found[name] = {"ratio": peaks[0] / peaks[1], "target": target}
    return found


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Loads, updates once, and reads the peak."""
    network, layout, changes = ROWS[name]
    student = student_of(layout)
    warm_up(args.work_dir, student, changes)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        argv = command_line(teacher_folder(args, network), Path(folder), **flags_of(args, name))
        before = reset_mark()
        run = make_run(argv, student, None if layout == "full" else LAYOUTS[layout])
        make_states(run)
        leave_files(run)
        reset_mark()
        seconds = cost(run.update).wall
        peak = mark() - before
    trained = sum(parameter.numel() for parameter in run.networks.parameters(STUDENT))
    return {"peak_gib": peak / GIB, "million_trained_of_student": trained / 1e6, "seconds": seconds}


def leave_files(run: Run) -> None:
    """Copies weights that are still pages of a file into memory, and lets go of the file's other pages."""
    for module in run.networks.modules:
        for parameter in module.parameters():
            if type(parameter.data) is torch.Tensor:  # quantised weights are in memory already
                parameter.data = parameter.data.clone()
    free_memory()


def warm_up(work_dir: Path, student: str, changes: dict[str, Any]) -> None:
    """An update of the tiny teacher, so that all libraries are loaded and have their own memory."""
    flags = {
        name: changes[name] for name in ("use_8bit_adam", "base_quantization", "mixed_precision") if name in changes
    }
    flags |= dict(train_batch_size=4, steps_per_rollout=1, num_student_steps=1)
    if student == "lora":
        flags |= dict(fold_adapters=False, rank=2)
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        make_run(command_line("tiny", Path(folder), **flags), student).update()
    free_memory()


def planned(args: argparse.Namespace, name: str) -> dict[str, float]:
    """The peaks that `--dry_run` plans for an update and for a whole run; nothing for layouts that are not ours."""
    network, layout, _ = ROWS[name]
    if layout not in ("shared", "full"):
        return {}
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        argv = command_line(teacher_folder(args, network), Path(folder), **flags_of(args, name))
        plan = plan_memory(parse_args(argv, student=student_of(layout)), "cuda" if torch.cuda.is_available() else "cpu")
    update = max(plan.phases[phase] for phase in PHASES)
    return {"planned_gib": update / GIB, "planned_for_whole_run_gib": plan.peak / GIB}


def student_of(layout: str) -> str:
    """The kind of student whose flags a layout takes."""
    return "full" if layout == "full" else "lora"


def flags_of(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A row's flags."""
    _, layout, changes = ROWS[name]
    return {**COMMON, **changes, **({"rank": None} if layout == "full" else {})}


def make_states(run: Run) -> None:
    """Makes the optimisers' states, by a step with zero gradients; only weight decay changes the weights."""
    for role in (STUDENT, FAKE_SCORE):
        for parameter in run.networks.parameters(role):
            parameter.grad = torch.zeros_like(parameter)
        run.state.optimizers[role].step()


def reset_mark() -> int:
    """Sets the peak back to the current memory, whose bytes it returns."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return of_status("VmRSS")


def mark() -> int:
    """The peak in bytes since `reset_mark`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else of_status("VmHWM")


def of_status(name: str) -> int:
    """A number of bytes from Linux's status of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def make_three_copies(
    config: RunConfig, teacher: Teacher, nothing: Conditioning, accelerator: Accelerator
) -> SeparateNetworks:
    """A copy of the base for each role."""
    source = (config.teacher.pretrained_model_name_or_path, DTYPES[config.memory.mixed_precision])
    denoisers = {role: load_denoiser(*source).eval().requires_grad_(False) for role in (STUDENT, FAKE_SCORE)}
    for denoiser in denoisers.values():
        prepare_denoiser(denoiser, config.memory, teacher.family)
        add_adapters(denoiser, {"default": lora_config(teacher.family, config.student)})
    networks = SeparateNetworks(
        {**denoisers, TEACHER: teacher.denoiser}, **common(config, teacher, nothing, accelerator)
    )
    place(networks, accelerator)
    return networks


class FullFakeScore(SharedBase):
    """A student's LoRA on the teacher's base, and a fake score that is a network of its own."""

    autocast_roles = (FAKE_SCORE,)

    def __init__(self, fake_score, *args, **kwargs):
        self.fake_score = fake_score
        super().__init__(*args, **kwargs)
        self.denoiser.delete_adapters("fake_score")

    @property
    def modules(self) -> list:
        return [self.denoiser, self.fake_score]

    def _find_trainable(self) -> None:
        super()._find_trainable()
        self._trainable[FAKE_SCORE] = list(self.fake_score.parameters())

    def _network(self, role: str):
        return self.fake_score if role == FAKE_SCORE else super()._network(role)


def make_full_fake(
    config: RunConfig, teacher: Teacher, nothing: Conditioning, accelerator: Accelerator
) -> FullFakeScore:
    """As other implementations do it: all weights of the fake score are trained."""
    fake_score = load_denoiser(config.teacher.pretrained_model_name_or_path, torch.float32).eval()
    for denoiser in (fake_score, teacher.denoiser):
        prepare_denoiser(denoiser, config.memory, teacher.family)
    adapters = lora_config(teacher.family, config.student)
    dtype = None if config.memory.mixed_precision == "no" else DTYPES[config.memory.mixed_precision]
    options = common(config, teacher, nothing, accelerator)
    networks = FullFakeScore(fake_score, teacher.denoiser, adapters, compute_dtype=dtype, **options)
    place(networks, accelerator)
    return networks


def common(config: RunConfig, teacher: Teacher, nothing: Conditioning, accelerator: Accelerator) -> dict[str, Any]:
    """What all kinds of `Networks` take."""
    return dict(
        family=teacher.family, schedule=teacher.schedule, prediction_type=teacher.prediction_type,
        null_conditioning=nothing.to(accelerator.device, DTYPES[config.memory.mixed_precision]),
        guidance_scale=config.method.guidance_scale,
    )  # fmt: skip


LAYOUTS = {"shared": networks_of_run, "three_copies": make_three_copies, "full_fake": make_full_fake}


if __name__ == "__main__":
    main()
