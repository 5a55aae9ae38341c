"""Two processes are one process with twice the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from parts import read_state, relative_error, run_arguments
from safetensors.torch import load_file

import train_rdm_lora

SCRIPT = Path(train_rdm_lora.__file__)
LORA = "pytorch_lora_weights.safetensors"


GNDMR = dict(algorithm="gndmr", reward=["tiny_bold", "tiny_prompt_black_box"], gndm_lambda="james_stein")


@pytest.mark.parametrize("options", [{}, GNDMR], ids=["gndm", "gndmr_with_james_stein"])
def test_two_processes_train_the_student_of_one_process(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path, options: dict
) -> None:
    def argv(name: str, batch: int) -> list[str]:
        return run_arguments(
            teacher_folder, prompts_file, tmp_path / name, train_batch_size=batch, learning_rate=1e-3,
            checkpointing_steps=1, validation_steps=1, num_validation_images=1, **options,
        )  # fmt: skip

    train_rdm_lora.main(argv("one", 8))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    quiet = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *argv("two", 4)], env=os.environ | quiet, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (list(load_file(tmp_path / name / LORA).values()) for name in ("one", "two"))
    assert relative_error(two, one) < 1e-4
    for update in (1, 2):
        one, two = (read_state(tmp_path / name / f"checkpoint-{update}") for name in ("one", "two"))
        assert relative_error([two[key] for key in one], list(one.values())) < 1e-4
    files = [sorted(str(path.relative_to(tmp_path / n)) for path in (tmp_path / n).rglob("*")) for n in ("one", "two")]
    assert files[0] == files[1]
