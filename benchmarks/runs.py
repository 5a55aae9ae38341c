"""Training runs as subprocesses: resumable, some at a time, their results read from `metrics.json`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rdm_diffusers.evaluation import measure, student_sampler
from rdm_diffusers.evaluation.report import machine
from rdm_diffusers.pipelines import RdmDistillationPipeline

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def train(folder: Path, flags: list[str], threads: int, script: str = "train_rdm_lora.py") -> dict:
    """Runs a training script into `folder` unless its result is there; its `metrics.json`."""
    result = folder / "metrics.json"
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        resume = ["--resume_from_checkpoint", "latest"] if any(folder.glob("checkpoint-*")) else []
        command = [sys.executable, str(ROOT / script), "--output_dir", str(folder), *flags, *resume]
        with open(folder / "log.txt", "a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    return json.loads(result.read_text())


def train_all(runs: dict[str, list[str]], folder: Path, jobs: int, threads: int) -> dict[str, dict]:
    """Every named run's `metrics.json`, `jobs` runs at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda name: train(folder / name, runs[name], threads), runs)
        return dict(zip(runs, results, strict=True))


def measure_student(folder: Path, num_images: int) -> dict:
    """The numbers of the student in `folder`, on as many pictures; kept beside it."""
    result = folder / f"measured-{num_images}.json"
    if not result.exists():
        student = RdmDistillationPipeline.from_pretrained(folder)
        result.write_text(json.dumps(measure(student_sampler(student), "rdm", num_images).as_dict()))
    return json.loads(result.read_text())


def write_result(name: str, record: dict) -> Path:
    """Writes `results/<name>.json` with the command and the machine."""
    RESULTS.mkdir(exist_ok=True)
    record = {"command": " ".join(["python", *sys.argv]), "machine": machine(), **record}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(path.read_text())
    return path
