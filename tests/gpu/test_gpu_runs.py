"""Whole runs on a CUDA card, with what only a card can do; skipped without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parts import PROMPTS, read_state, run_arguments

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from gpu_steps import measure, planned_gib

import train_rdm_full
import train_rdm_lora
from rdm_diffusers.families import QUANTIZATIONS
from rdm_diffusers.pipelines import RdmDistillationPipeline

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
FSDP = ["-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "1"]


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run into a named folder of this test."""
    return lambda name, **changes: run_arguments(teacher_folder, prompts_file, tmp_path / name, **changes)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "offload": True},
        {"mixed_precision": "bf16", "use_8bit_adam": True, "rank": 32},
    ],
    ids=["float32", "bf16", "8bit_adam"],
)
def test_resuming_changes_nothing(flags: dict, argv, tmp_path: Path) -> None:
    options = dict(checkpointing_steps=2, **flags)
    train_rdm_lora.main(argv("straight", max_train_steps=4, **options))
    train_rdm_lora.main(argv("broken", max_train_steps=2, **options))
    train_rdm_lora.main(argv("broken", max_train_steps=4, resume_from_checkpoint="latest", **options))
    straight, broken = (read_state(tmp_path / name / "checkpoint-4") for name in ("straight", "broken"))
    assert straight.keys() == broken.keys()
    assert all(torch.equal(tensor, broken[name]) for name, tensor in straight.items())
    assert any(t.dtype == torch.uint8 for t in straight.values()) == ("use_8bit_adam" in flags)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("student", ["lora", "full"])
def test_a_student_is_distilled_from_quantised_weights(kind: str, student: str, argv, tmp_path: Path) -> None:
    flags = dict(mixed_precision="bf16", gradient_checkpointing=True)
    if student == "lora":
        train_rdm_lora.main(argv("student", base_quantization=kind, **flags))
    else:
        train_rdm_full.main(argv("student", teacher_quantization=kind, rank=None, **flags))
    pipeline = RdmDistillationPipeline.from_pretrained(tmp_path / "student").to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(PROMPTS[0], output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("launcher", [TORCHRUN, FSDP], ids=["nccl", "fsdp2"])
@pytest.mark.parametrize("script", ["train_rdm_lora.py", "train_rdm_full.py"])
def test_one_launched_process_trains_and_exports(launcher: list[str], script: str, argv, tmp_path: Path) -> None:
    flags = argv("student", mixed_precision="bf16", checkpointing_steps=1, rank=2 if "lora" in script else None)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / script), *flags], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "student" / "checkpoint-2").is_dir()
    assert (tmp_path / "student" / "rdm_config.json").exists()


@pytest.mark.parametrize("name", ["sd15", "sd35_medium_nf4"])
def test_an_update_needs_the_memory_that_was_planned(name: str, tmp_path: Path) -> None:
    found = next(measure(name, tmp_path, small=False))
    assert found["peak_gib"] == pytest.approx(planned_gib(name, tmp_path, small=False), rel=0.1)


@pytest.mark.parametrize("offload", [None, True])
def test_a_run_with_rewards_in_bf16_ends_with_a_student(offload: bool | None, argv, tmp_path: Path) -> None:
    rewards = dict(algorithm="gndmr", reward=["tiny_bold", "tiny_prompt_black_box"], decode_batch_size=3)
    train_rdm_lora.main(argv("student", **rewards, mixed_precision="bf16", offload=offload))
    assert (tmp_path / "student" / "rdm_config.json").exists()
