"""What docs/clusters.md and the Dockerfile say works, as far as that shows without Slurm, jobs and containers."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import JobHardware
from parts import run_arguments
from parts_processes import free_port

from rdm_diffusers.pipelines import is_student

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/clusters.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
COPIED = [name for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, flags=re.MULTILINE) for name in line.split()]
JOBS = [block for block in BLOCKS if block.startswith("hf jobs run")]

PROGRAMS = {  # in the places of Slurm's, on one node
    "srun": '#!/bin/bash\nexec "$@"\n',
    "scontrol": '#!/bin/bash\nif [ "$1" = show ]; then echo localhost; else echo "$@" >> "$SLURM_CALLS"; fi\n',
}


def launch(script: Path, words: list[str], folder: Path) -> subprocess.Popen[str]:
    """Starts the page's script as Slurm does."""
    place = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0",
             "SLURM_GPUS_ON_NODE": "1", "SLURM_CALLS": str(folder / "calls")}  # fmt: skip
    environment = os.environ | slurm | {"PATH": place, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        ["bash", str(script), *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.timeout(400)
def test_a_slurm_job_saves_queues_itself_again_and_ends_with_a_student(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    script, student = tmp_path / "rdm.sh", tmp_path / "student"
    script.write_text(next(block for block in BLOCKS if "#SBATCH" in block).replace("29500", str(free_port())))
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    words = run_arguments(teacher_folder, prompts_file, student, max_train_steps=20_000, checkpointing_steps=2)
    place = words.index("--output_dir")
    words = [str(student), str(ROOT / "train_rdm_lora.py"), *words[:place], *words[place + 2 :]]

    first = launch(script, words, tmp_path)
    deadline = time.monotonic() + 120
    while not list(student.glob("checkpoint-*")):
        assert first.poll() is None, first.communicate()[0]
        if time.monotonic() > deadline:
            first.send_signal(signal.SIGTERM)
            pytest.fail(first.communicate(timeout=60)[0])
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=120)[0]
    assert first.returncode != 0 and "Interrupted after" in said, said
    assert (tmp_path / "calls").read_text() == "requeue 7\n"
    assert not is_student(student)

    done = max(int(path.name.split("-")[1]) for path in student.glob("checkpoint-*"))
    words[words.index("20000")] = str(done + 2)
    second = launch(script, words, tmp_path)
    said = second.communicate(timeout=200)[0]
    assert second.returncode == 0, said
    assert is_student(student)
    assert (tmp_path / "calls").read_text() == "requeue 7\n"


@pytest.mark.parametrize("command", JOBS)
def test_the_hubs_client_accepts_the_pages_jobs(command: str, tmp_path: Path) -> None:
    words = shlex.split(command.replace("\\\n", " "))
    assert words[words.index("--flavor") + 1] in [each.value for each in JobHardware]
    place = str(Path(sys.executable).parent / words[0])
    done = subprocess.run(
        [place, *words[1:3], "--dry-run", *words[3:]], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env=os.environ | {"HF_TOKEN": "hf_none"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Job not submitted" in done.stdout + done.stderr


def test_the_image_has_the_python_and_the_extras_that_the_package_is_tested_with() -> None:
    version = re.search(r"tested on Python ([\d.]+\d)", (ROOT / "constraints.txt").read_text())[1]
    assert f"FROM python:{version}-slim\n" in DOCKERFILE and f"python:{version} bash" in " ".join(JOBS)
    assert "pip install --no-cache-dir -c constraints.txt" in DOCKERFILE
    setup = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}": [' in setup for extra in re.search(r"'\.\[(.*)\]'", DOCKERFILE)[1].split(","))


def test_the_image_runs_as_a_user_without_privileges() -> None:
    user = re.findall(r"^USER (\w+)$", DOCKERFILE, flags=re.MULTILINE)[-1]
    assert f"useradd --create-home --uid 1000 {user}" in DOCKERFILE
    assert "RUN" not in DOCKERFILE.split(f"USER {user}")[1]


def test_what_the_image_copies_is_enough_to_install_the_package(tmp_path: Path) -> None:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    build = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('.')"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rdm_diffusers").rglob("*.py")}
    assert files | {"train_rdm_lora.py", "train_rdm_full.py"} <= names
    assert "rdm_diffusers/tiny/classifier.safetensors" in names
