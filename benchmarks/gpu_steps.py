"""The large teachers of `gpu_check.py`: the memory and the seconds of an update, beside its bare network calls."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.training_utils import free_memory
from flops import FlopsByDtype
from memory import GIB, LAYOUTS, PHASES
from step_cost import Run, command_line, cost, make_run, save_teacher
from throughput import collect_whole, floor
from transformers import CLIPModel

from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.rewards.clip import vit_h_config
from rdm_diffusers.tiny.captions import make_tokenizer
from rdm_diffusers.training.assembly import networks_of_run
from rdm_diffusers.training.memory_plan import plan_memory
from rdm_diffusers.training.tracking import peak_memory

REPEATS = 3
COMMON: dict[str, Any] = dict(
    mixed_precision="bf16", gradient_checkpointing=True, use_8bit_adam=True, train_batch_size=1, group_size=4,
    gradient_accumulation_steps=4, num_student_steps=4, steps_per_rollout=1, guidance_scale=4.5, rank=64,
    resolution=1024,
)  # fmt: skip
NF4 = {"base_quantization": "nf4"}
WHOLE = {"gradient_checkpointing": None}
REWARD = {"algorithm": "gndmr", "reward": "hpsv2", "reward_dtype": "bfloat16"}
SD15 = {"resolution": 512}
# name -> the network, the layout of the roles, and what differs from the common flags
TEACHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sdxl": ("sdxl", "shared", {}),
    "flux_nf4": ("flux", "shared", NF4),
    "sdxl_no_checkpointing": ("sdxl", "shared", WHOLE),
    "sdxl_compiled": ("sdxl", "shared", {**WHOLE, "torch_compile": True}),
    "sd35_medium_nf4": ("sd35_medium", "shared", NF4),
    "sd15_full": ("sd15", "full", {**SD15, "rank": None}),
    "sd15_hpsv2": ("sd15_whole", "shared", {**SD15, **REWARD}),
    "sd15": ("sd15", "shared", SD15),
    "sd15_three_copies": ("sd15", "three_copies", SD15),
    "sdxl_channels_last": ("sdxl", "shared", {**WHOLE, "channels_last": True}),
    "sdxl_int8": ("sdxl", "shared", {"base_quantization": "int8"}),
}


def flags_of(name: str, small: bool) -> dict[str, Any]:
    """A row's flags. Small networks are not quantised, and are compiled by a backend that every machine has."""
    _, layout, changes = TEACHERS[name]
    flags = {**COMMON, **changes}
    if small:
        flags |= dict(resolution=128, group_size=2, gradient_accumulation_steps=2, num_student_steps=2)
        flags |= {"base_quantization": None, "rank": None if layout == "full" else 4}
        flags |= {"torch_compile_backend": "aot_eager"} if "torch_compile" in flags else {}
    return flags


def student_of(name: str) -> str:
    """The kind of student whose flags a row takes."""
    return "full" if TEACHERS[name][1] == "full" else "lora"


def teacher_of(name: str, scratch: Path, small: bool) -> Path:
    """The folder of a row's teacher with random weights, made once for all its rows."""
    network = TEACHERS[name][0]
    folder = scratch / f"teacher-{network}"
    if not (folder / "model_index.json").exists():
        save_teacher(network, folder, torch.bfloat16, small)
        free_memory()
    return folder


def with_reward(flags: dict[str, Any], scratch: Path, small: bool) -> dict[str, Any]:
    """The flags with a reward's random weights, of CLIP ViT-H-14 or of a small one, which are made once."""
    if "reward" not in flags:
        return flags
    folder = scratch / "clip"
    if not (folder / "config.json").exists():
        config = vit_h_config()
        if small:
            for tower in (config.text_config, config.vision_config):
                tower.num_hidden_layers, tower.hidden_size, tower.num_attention_heads = 1, 32, 2
                tower.intermediate_size = 64
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = CLIPModel(config)
        model.to(torch.bfloat16).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return {**flags, "reward": f"{flags['reward']}={folder}"}


def planned_gib(name: str, scratch: Path, small: bool) -> float:
    """The peak of an update that `--dry_run` plans, in GiB."""
    argv = command_line(teacher_of(name, scratch, small), scratch, **with_reward(flags_of(name, small), scratch, small))
    plan = plan_memory(parse_args(argv, student=student_of(name)))
    return max(plan.phases[phase] for phase in PHASES) / GIB


def measure(name: str, scratch: Path, small: bool) -> Iterator[dict[str, Any]]:
    """One teacher's numbers, yielded again whenever there are more.

    Args:
        name: one of `TEACHERS`.
        scratch: an existing folder, for the teachers' weights and the runs.
        small: whether networks are small, to try the code.
    """
    started, flags, layout = time.time(), flags_of(name, small), TEACHERS[name][1]
    argv = command_line(teacher_of(name, scratch, small), scratch / name, **with_reward(flags, scratch, small))
    run = make_run(argv, student_of(name), networks_of_run if layout == "full" else LAYOUTS[layout])
    found: dict[str, Any] = {"flags": flags, "assembly_seconds": time.time() - started}
    found["first_update_seconds"] = cost(run.update).wall  # makes the optimisers' states and compiles
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found["update_seconds"] = median(cost(run.update).wall for _ in range(REPEATS))
    found["peak_gib"] = peak_memory(run.accelerator.device) / GIB
    yield found
    if not flags.get("torch_compile"):
        found["float32_share_of_operations"] = float32_share(run)
        yield found
    found |= bare_calls(run)
    found["update_over_bare_calls"] = found["update_seconds"] / found["bare_calls_seconds"]
    yield found


def bare_calls(run: Run) -> dict[str, Any]:
    """Seconds of the network calls alone that an update needs, as the median of a few."""
    parts: dict[str, list[float]] = {}
    for number in range(1, REPEATS + 1):
        for name, calls in floor(run, collect_whole(run, number)).items():
            parts.setdefault(name, []).append(cost(lambda calls=calls: list(calls)).wall)
    by_part = {name: median(seconds) for name, seconds in parts.items()}
    return {"bare_calls_seconds": sum(by_part.values()), "bare_calls_by_part": by_part}


def float32_share(run: Run) -> float:
    """The share of an update's floating-point operations that are in float32."""
    with FlopsByDtype() as operations:
        run.update()
    return operations.share(torch.float32)
