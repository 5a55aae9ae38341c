"""One thread, no network, caches of its own; and the two fixtures that many files share.

The processor is tested, whatever else the machine has; set CUDA_VISIBLE_DEVICES to test on a GPU.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CACHE = tempfile.TemporaryDirectory(prefix="rdm-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = CACHE.name
os.environ["HF_DATASETS_CACHE"] = os.path.join(CACHE.name, "datasets")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(Path(__file__).parents[1]))  # train_rdm_lora.py

import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """The whole test in float64; for claims that hold but for rounding."""
    from parts_float64 import in_float64

    with in_float64():
        yield


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Stable Diffusion pipeline, as small as it can be, saved as a teacher."""
    from parts import make_pipeline

    folder = tmp_path_factory.mktemp("teacher")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts."""
    from parts import PROMPTS

    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_student(prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA student of the tiny teacher, after two updates."""
    from parts import run_arguments

    import train_rdm_lora

    folder = tmp_path_factory.mktemp("tiny-student")
    train_rdm_lora.main(run_arguments("tiny", prompts_file, folder, steps_per_rollout=2))
    return folder
