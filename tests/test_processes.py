"""Two processes are one process with twice the batch, step by step: replicated or sharded, LoRA or full weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from parts import read_state, relative_error, run_arguments, train_only
from parts_processes import QUIET, in_two_processes
from safetensors.torch import load_file

import train_rdm_full
import train_rdm_lora
from rdm_diffusers.commands import export
from rdm_diffusers.families import LORA_FILE

SCRIPTS = {"lora": train_rdm_lora, "full": train_rdm_full}
ROOT = str(Path(train_rdm_lora.__file__).parent)
ENGINES = {"ddp": {}, "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
GNDMR = dict(algorithm="gndmr", reward=["tiny_bold", "tiny_prompt_black_box"])
TDM = dict(algorithm="tdm", gndm_lambda=0.5, guidance_range=[1.5, 3.0])
ACCUMULATED = dict(gradient_accumulation_steps=2, fake_score_steps=True, gradient_checkpointing=True)
RATIO = dict(algorithm="f_distill", num_target_images=64, target_inference_steps=2, fake_updates_per_step=1)
CASES = {
    "lora": ("lora", "ddp", {}),
    "lora_gndmr": ("lora", "ddp", GNDMR),
    "lora_tdm": ("lora", "ddp", TDM),
    "full_accumulated": ("full", "ddp", ACCUMULATED),
    "lora_f_distill": ("lora", "ddp", RATIO),
    "lora_sharded_accumulated": ("lora", "fsdp2", ACCUMULATED),
    "full_sharded_gndmr": ("full", "fsdp2", GNDMR),
}
TOLERANCE = 1e-4  # of the norm of all numbers in a checkpoint, after each of two updates


def train(runs: list[Callable[[], None]], engine: str = "ddp") -> None:
    """Runs, one after the other, in the same two processes. The last ends their group, as any launched run does."""

    def work() -> None:
        for run in runs[:-1]:
            run()
        os.environ["FORK_LAUNCHED"] = "0"
        PartialState._shared_state.update({"fork_launched": False} if runs[:-1] else {})
        runs[-1]()

    in_two_processes(work, **ENGINES[engine])


def launch(argv: list[str]) -> int:
    """A LoRA run in two processes of torchrun; its exit status."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*torchrun, train_rdm_lora.__file__, *argv]
    return subprocess.run(words, env=os.environ | QUIET | {"PYTHONPATH": ROOT}, capture_output=True).returncode


def files(folder: Path) -> list[str]:
    """All that a run left behind; one file of a LoRA student has its folder's name."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(name.replace(f"comfyui/{folder.name}.", "comfyui/student.") for name in found)


KILLER = """
import os, pathlib, signal

def deadly(images, prompts):
    if os.environ['RANK'] == '1' and pathlib.Path({checkpoint!r}).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return images.mean((1, 2, 3))
"""

pytestmark = pytest.mark.timeout(900)  # all runs are made before the first test


@pytest.fixture(scope="module")
def launched(teacher_folder: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of two processes: one that is killed under torchrun, then replicated, sharded, and replicated again.

    Returns:
        The folder of the folders `one-NAME` and `two-NAME` for each case, `straight`, `changing` and `killed`.
    """
    folder = tmp_path_factory.mktemp("processes")

    def compared(name: str, processes: int) -> Callable[[], None]:
        student, _, options = CASES[name]
        rank = {} if student == "lora" else {"rank": None}
        argv = run_arguments(
            teacher_folder, prompts_file, folder / f"{'one' if processes == 1 else 'two'}-{name}",
            train_batch_size=8 // processes, learning_rate=1e-3, checkpointing_steps=1, validation_steps=1,
            num_validation_images=1, **options, **rank,
        )  # fmt: skip
        return partial(SCRIPTS[student].main, argv)

    def changing(name: str, updates: int, batch: int, **options) -> Callable[[], None]:
        argv = run_arguments(
            teacher_folder, prompts_file, folder / name, train_batch_size=batch, checkpointing_steps=1,
            max_train_steps=updates, learning_rate=1e-3, **options,
        )  # fmt: skip
        return partial(train_only, argv)

    for run in [*(compared(name, 1) for name in CASES), changing("straight", 3, 8)]:
        run()

    killer = folder / "reward.py"
    killer.write_text(KILLER.format(checkpoint=str(folder / "killed" / "checkpoint-1")))
    argv = run_arguments(
        teacher_folder, prompts_file, folder / "killed", train_batch_size=4, checkpointing_steps=1, max_train_steps=3,
        algorithm="gndmr", reward=f"{killer}:deadly",
    )  # fmt: skip
    assert launch(argv) != 0
    assert files(folder / "killed")[:1] == ["checkpoint-1"]
    assert not (folder / "killed" / "rdm_config.json").exists()
    killer.write_text("def deadly(images, prompts):\n    return images.mean((1, 2, 3))\n")

    cases = {engine: [compared(name, 2) for name in CASES if CASES[name][1] == engine] for engine in ENGINES}
    resumed = {"resume_from_checkpoint": "latest"}
    going_on = partial(train_only, [*argv, "--resume_from_checkpoint", "latest"])
    train([*cases["ddp"], changing("changing", 1, 4), going_on], "ddp")
    train([*cases["fsdp2"], changing("changing", 2, 4, **resumed)], "fsdp2")
    train([changing("changing", 3, 4, **resumed)], "ddp")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_the_student_of_one_process(name: str, launched: Path, tmp_path: Path) -> None:
    one_folder, two_folder, student = launched / f"one-{name}", launched / f"two-{name}", CASES[name][0]
    for update in (1, 2):
        one, two = (read_state(folder / f"checkpoint-{update}") for folder in (one_folder, two_folder))
        assert one.keys() == two.keys()
        assert relative_error([two[key] for key in one], list(one.values())) < TOLERANCE
        for role in ("student", "fake_score", "ema"):
            keys = [key for key in one if key.startswith((f"{role}/parameter/", "ema/"))]
            assert relative_error([two[key] for key in keys], [one[key] for key in keys]) < TOLERANCE
    assert files(one_folder) == files(two_folder)
    export.main([str(two_folder / "checkpoint-2"), "--format", student, "--output_dir", str(tmp_path / "new")])
    weights = LORA_FILE if student == "lora" else "unet/diffusion_pytorch_model.safetensors"
    ours, theirs = (load_file(folder / weights) for folder in (tmp_path / "new", two_folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_sharded_run_goes_on_from_a_replicated_ones_checkpoint_and_the_other_way(launched: Path) -> None:
    straight, changing = (read_state(launched / name / "checkpoint-3") for name in ("straight", "changing"))
    assert relative_error([changing[key] for key in straight], list(straight.values())) < TOLERANCE


def test_a_killed_process_ends_the_run_and_the_last_checkpoint_serves(launched: Path) -> None:
    assert (launched / "killed" / "checkpoint-3").exists()
    assert (launched / "killed" / "rdm_config.json").exists()
