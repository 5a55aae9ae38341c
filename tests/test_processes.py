"""Two processes are one process with twice the batch, step by step: replicated or sharded, LoRA or full weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parts import read_state, relative_error, run_arguments
from safetensors.torch import load_file

import train_rdm_full
import train_rdm_lora
from rdm_diffusers.commands import export
from rdm_diffusers.families import LORA_FILE

SCRIPTS = {"lora": train_rdm_lora, "full": train_rdm_full}
QUIET = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
ENGINES = {"ddp": {}, "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
GNDMR = dict(algorithm="gndmr", reward=["tiny_bold", "tiny_prompt_black_box"])
ACCUMULATED = dict(gradient_accumulation_steps=2, fake_score_steps=True, gradient_checkpointing=True)
TOLERANCE = 1e-4  # of the norm of all numbers in a checkpoint, after each of two updates


def launch(student: str, argv: list[str], engine: str = "ddp", processes: int = 2) -> subprocess.CompletedProcess:
    """A run of several processes on this machine."""
    script = str(SCRIPTS[student].__file__)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*torchrun, script, *argv], env=os.environ | QUIET | ENGINES[engine], capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def files(folder: Path) -> list[str]:
    """All that a run left behind; one file of a LoRA student has its folder's name."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(name.replace(f"comfyui/{folder.name}.", "comfyui/student.") for name in found)


@pytest.mark.parametrize(
    ("student", "engine", "options"),
    [("lora", "ddp", {}), ("lora", "ddp", GNDMR), ("full", "ddp", ACCUMULATED), ("lora", "fsdp2", ACCUMULATED),
     ("full", "fsdp2", GNDMR)],
    ids=["lora", "lora_gndmr", "full_accumulated", "lora_sharded_accumulated", "full_sharded_gndmr"],
)  # fmt: skip
def test_two_processes_train_the_student_of_one_process(
    student: str, engine: str, options: dict, teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    def argv(name: str, batch: int) -> list[str]:
        rank = {} if student == "lora" else {"rank": None}
        return run_arguments(
            teacher_folder, prompts_file, tmp_path / name, train_batch_size=batch, learning_rate=1e-3,
            checkpointing_steps=1, validation_steps=1, num_validation_images=1, **options, **rank,
        )  # fmt: skip

    SCRIPTS[student].main(argv("one", 8))
    done = launch(student, argv("two", 4), engine)
    assert done.returncode == 0, done.stderr[-3000:]
    for update in (1, 2):
        one, two = (read_state(tmp_path / name / f"checkpoint-{update}") for name in ("one", "two"))
        assert one.keys() == two.keys()
        assert relative_error([two[key] for key in one], list(one.values())) < TOLERANCE
        for role in ("student", "fake_score", "ema"):
            keys = [key for key in one if key.startswith((f"{role}/parameter/", "ema/"))]
            assert relative_error([two[key] for key in keys], [one[key] for key in keys]) < TOLERANCE
    assert files(tmp_path / "one") == files(tmp_path / "two")
    export.main([str(tmp_path / "two" / "checkpoint-2"), "--format", student, "--output_dir", str(tmp_path / "new")])
    name = LORA_FILE if student == "lora" else "unet/diffusion_pytorch_model.safetensors"
    ours, theirs = (load_file(tmp_path / folder / name) for folder in ("new", "two"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_sharded_run_goes_on_from_a_replicated_ones_checkpoint_and_the_other_way(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    def argv(name: str, updates: int, batch: int, **options) -> list[str]:
        return run_arguments(
            teacher_folder, prompts_file, tmp_path / name, train_batch_size=batch, checkpointing_steps=1,
            max_train_steps=updates, learning_rate=1e-3, **options,
        )  # fmt: skip

    train_rdm_lora.main(argv("straight", 3, 8))
    for updates, engine in enumerate(("ddp", "fsdp2", "ddp"), start=1):
        resumed = {} if updates == 1 else {"resume_from_checkpoint": "latest"}
        done = launch("lora", argv("changing", updates, 4, **resumed), engine)
        assert done.returncode == 0, done.stderr[-3000:]
    straight, changing = (read_state(tmp_path / name / "checkpoint-3") for name in ("straight", "changing"))
    assert relative_error([changing[key] for key in straight], list(straight.values())) < TOLERANCE


def test_a_killed_process_ends_the_run_and_the_last_checkpoint_serves(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    killer = tmp_path / "reward.py"
    killer.write_text(
        "import os, pathlib, signal\n\n\n"
        "def deadly(images, prompts):\n"
        f"    if os.environ['RANK'] == '1' and pathlib.Path({str(tmp_path / 'run' / 'checkpoint-1')!r}).exists():\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return images.mean((1, 2, 3))\n"
    )
    argv = run_arguments(
        teacher_folder, prompts_file, tmp_path / "run", train_batch_size=4, checkpointing_steps=1, max_train_steps=3,
        algorithm="gndmr", reward=f"{killer}:deadly",
    )  # fmt: skip
    done = launch("lora", argv)
    assert done.returncode != 0
    assert files(tmp_path / "run")[:1] == ["checkpoint-1"]
    assert not (tmp_path / "run" / "rdm_config.json").exists()
    killer.write_text("def deadly(images, prompts):\n    return images.mean((1, 2, 3))\n")
    done = launch("lora", [*argv, "--resume_from_checkpoint", "latest"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "checkpoint-3").exists()
