"""What the processor has to do in an update of a large teacher, and what layout and compilation change on a processor.

    python benchmarks/host.py --work_dir host

- `draws`: an update's random numbers, which are drawn on the CPU, for a group of 4 at 1024 px.
- `average`: the moving average of a LoRA where it is on the CPU, by our own update and by diffusers'.
- `channels_last`: an update of a U-Net of 80 million parameters with and without `--channels_last`.
- `inductor`: both adapters of a tiny U-Net under `--torch_compile` beside the same without it (needs a C++ compiler).

`--only` selects some and writes no result.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from runs import ROOT, write_result
from step_cost import command_line, cost, make_run, save_teacher, software
from torch import nn

sys.path.insert(0, str(ROOT / "tests"))
from parts import make_conditioning, make_shared, relative_error

from rdm_diffusers.config import MemoryConfig
from rdm_diffusers.distillation import Draws
from rdm_diffusers.networks import ROLES, TEACHER
from rdm_diffusers.training.devices import compile_blocks
from rdm_diffusers.training.optimizers import update_average

REPEATS = 7
LATENTS = {"sdxl": (4, 128, 128), "flux": (16, 128, 128)}
GROUP_SIZE, STEPS, FAKE_UPDATES = 4, 4, 1
SHAPES = [(320, 64), (64, 320), (1280, 64), (64, 1280)] * 400  # like a LoRA's, 82 million numbers
MID: dict[str, Any] = dict(
    resolution=128, train_batch_size=4, group_size=4, num_student_steps=2, steps_per_rollout=1, guidance_scale=7.5,
    rank=16,
)  # fmt: skip


def draws(work_dir: Path) -> dict[str, Any]:
    """The tensors of noise: one for each step of a rollout, one for R_dm, one for each update of the fake score."""
    tensors, drawer, found = STEPS + 1 + FAKE_UPDATES, Draws(0, GROUP_SIZE), {}

    def draw(shape: tuple[int, ...], update: int) -> None:
        for k in range(tensors):
            drawer.normal(f"noise/{k}", [update], shape)

    for name, shape in LATENTS.items():
        seconds = median(cost(partial(draw, shape, update)).cpu for update in range(REPEATS))
        found[name] = {"tensors": tensors, "latents": [GROUP_SIZE, *shape], "processor_seconds": seconds}
    return found


def average(work_dir: Path) -> dict[str, Any]:
    """The seconds of a step of the moving average, and whether both ways have the same bits."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs, ours = (EMAModel(parameters, decay=0.99) for _ in range(2))
    seconds: dict[str, list[float]] = {"diffusers": [], "ours": []}
    for _ in range(REPEATS):
        for parameter in parameters:
            parameter.data += 0.01
        seconds["diffusers"].append(cost(lambda: theirs.step(parameters)).cpu)
        seconds["ours"].append(cost(lambda: update_average(ours, parameters)).cpu)
    same = all(torch.equal(a, b) for a, b in zip(theirs.shadow_params, ours.shadow_params, strict=True))
    numbers = sum(parameter.numel() for parameter in parameters)
    medians = {name: median(values) for name, values in seconds.items()}
    return {"million_numbers": numbers / 1e6, "same_bits": same, "processor_seconds": medians}


def channels_last(work_dir: Path) -> dict[str, Any]:
    """Seconds of an update, in turns, after one each that is not counted."""
    teacher, found = save_teacher("sd_mid", work_dir / "sd_mid"), {}
    runs = {
        name: make_run(command_line(teacher, work_dir / name, channels_last=flag, **MID))
        for name, flag in {"contiguous": None, "channels_last": True}.items()
    }
    for name, run in runs.items():
        run.update()
        found[name] = []
    for _ in range(3):
        for name, run in runs.items():
            found[name].append(cost(run.update).cpu)
    seconds = {name: median(values) for name, values in found.items()}
    return {"flags": MID, "processor_seconds": seconds, "ratio": seconds["channels_last"] / seconds["contiguous"]}


def inductor(work_dir: Path) -> dict[str, Any]:
    """Relative differences of every role's x0 and of both adapters' gradients, and the seconds that compiling takes."""
    results, seconds = [], []
    x_t, t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([20, 300, 600, 990])
    for compiled in (False, True):
        networks, started = make_shared(guidance_scale=2.0), time.perf_counter()
        compile_blocks(networks.denoiser, MemoryConfig(torch_compile=compiled, torch_compile_backend="inductor"))
        found = {}
        for role in ROLES:
            x0 = networks.predict(role, x_t, t, make_conditioning(4))
            found[f"{role} x0"] = [x0.detach()]
            if role != TEACHER:
                networks.backward(role, x0, torch.ones_like(x0))
                found[f"{role} gradient"] = [p.grad for p in networks.parameters(role)]
        results.append(found)
        seconds.append(time.perf_counter() - started)
    plain, other = results
    differences = {name: relative_error(other[name], plain[name]) for name in plain}
    return {"relative_differences": differences, "seconds": {"eager": seconds[0], "with compiling": seconds[1]}}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "draws": draws, "average": average, "channels_last": channels_last, "inductor": inductor
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="scratch")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="some of the parts; writes no result")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    record = {"software": software(), **{name: PARTS[name](args.work_dir) for name in args.only or PARTS}}
    if args.only:
        print(json.dumps(record, indent=2))
    else:
        write_result("host", record)


if __name__ == "__main__":
    main()
