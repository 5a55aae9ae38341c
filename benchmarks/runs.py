"""What benchmarks share: training runs and their own scripts as subprocesses, flags as words, and the result files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rdm_diffusers.evaluation import measure, student_sampler
from rdm_diffusers.evaluation.report import machine
from rdm_diffusers.pipelines import RdmDistillationPipeline

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def train(folder: Path, flags: list[str], threads: int, script: str = "train_rdm_lora.py") -> dict:
    """Runs a training script into `folder` unless it has a result; returns the run's `metrics.json`."""
    result = folder / "metrics.json"
    if not is_finished(result):
        folder.mkdir(parents=True, exist_ok=True)
        resume = ["--resume_from_checkpoint", "latest"] if any(folder.glob("checkpoint-*")) else []
        command = [sys.executable, str(ROOT / script), "--output_dir", str(folder), *flags, *resume]
        with open(folder / "log.txt", "a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    return json.loads(result.read_text())


def is_finished(metrics: Path) -> bool:
    """Whether a run has drawn and measured all its pictures; it writes its `metrics.json` once before."""
    found = json.loads(metrics.read_text()) if metrics.exists() else None
    return found is not None and found["student"]["num_images"] == found["arguments"]["num_eval_images"]


def train_all(runs: dict[str, list[str]], folder: Path, jobs: int, threads: int) -> dict[str, dict]:
    """Every named run's `metrics.json`, `jobs` runs at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda name: train(folder / name, runs[name], threads), runs)
        return dict(zip(runs, results, strict=True))


def measure_student(folder: Path, num_images: int) -> dict:
    """The metrics of the student in `folder` on so many images; kept in the folder."""
    result = folder / f"measured-{num_images}.json"
    if not result.exists():
        student = RdmDistillationPipeline.from_pretrained(folder)
        result.write_text(json.dumps(measure(student_sampler(student), "rdm", num_images).as_dict()))
    return json.loads(result.read_text())


def words_of(flags: dict[str, Any]) -> list[str]:
    """Flags as a command line's words: True and False are switches, a list repeats a flag, None leaves it out."""
    words: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [f"--{name}", str(one)]
    return words


def python_path() -> str:
    """`PYTHONPATH` with the repository in front."""
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def row_of_process(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Runs a command and returns its last line, a JSON row; if it fails, `failed` with its last line of errors."""
    environment = {**environment, "PYTHONPATH": python_path()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def standard_error(values: list[float]) -> float | None:
    """Of the mean; None for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def means_of(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The `mean` and `standard_error` of every number with a fraction, over seeds."""
    values = {name: [point[name] for point in points] for name, value in points[0].items() if isinstance(value, float)}
    return {
        "mean": {name: mean(each) for name, each in values.items()},
        "standard_error": {name: standard_error(each) for name, each in values.items()},
    }


def paired_change(values: list[float], baseline: list[float]) -> dict[str, Any]:
    """The mean of 100 ln(value / baseline) over paired seeds, and its standard error."""
    change = [100 * math.log(a / b) for a, b in zip(values, baseline, strict=True)]
    return {"change_100_ln": mean(change), "standard_error": standard_error(change)}


def write_result(name: str, record: dict) -> Path:
    """Writes `results/<name>.json` with the command and the machine."""
    RESULTS.mkdir(exist_ok=True)
    record = {"command": " ".join(["python", *sys.argv]), "machine": machine(), **record}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(path.read_text())
    return path
