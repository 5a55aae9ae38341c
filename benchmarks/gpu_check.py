"""What needs a CUDA card: the tests of `tests/gpu`, the main job, and large teachers' memory and speed.

    python benchmarks/gpu_check.py --minutes 12 --output gpu-check

The most important steps come first. Each is a process of its own with a time limit. Its result is written into
`gpu_check.json` in the output folder at once, so that an interrupted check keeps it. `--steps` selects some. Large
teachers have their real networks with random weights, and tiny other parts. The peaks that `--dry_run` plans for them
are computed at the end, on the processor. `--device cpu --small` tries the code of every step with small networks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_steps import TEACHERS, measure, planned_gib
from runs import ROOT, python_path
from step_cost import software

from rdm_diffusers.evaluation.report import machine

TESTS = "tests"
MAIN = {"main_float32": [], "main_bf16": ["--mixed_precision", "bf16", "--no-fold_adapters"]}
LIMITS = {TESTS: 240, "sdxl": 150, **dict.fromkeys(MAIN, 400), **dict.fromkeys(TEACHERS, 150)}  # seconds
SMALL = ["--max_train_steps", "2", "--num_eval_images", "0", "--train_batch_size", "16", "--monitor_images", "0"]


def main() -> None:
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.run:
        for found in measure(args.run, args.output, args.small):
            print(json.dumps(found), flush=True)
        return
    about = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "software": software()}
    steps: dict[str, dict[str, Any]] = {}
    end = time.time() + 60 * args.minutes
    for name in args.steps:
        steps[name] = step(args, name, end)
        write(args.output, {**about, "steps": steps})
        print(name, json.dumps(steps[name]), flush=True)
    for name in set(args.steps) & set(TEACHERS):
        if "peak_gib" in steps[name]:
            steps[name]["planned_gib"] = planned_gib(name, args.output, args.small)
            write(args.output, {**about, "steps": steps})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of gpu_check.json, logs and scratch")
    parser.add_argument("--minutes", type=float, default=12, help="no step starts later")
    parser.add_argument("--steps", nargs="+", choices=LIMITS, default=list(LIMITS), help="which; all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is to try the code")
    parser.add_argument("--small", action="store_true", help="small networks and runs, to try the code")
    parser.add_argument("--run", choices=TEACHERS, help="measure one teacher and print it; for the script itself")
    return parser.parse_args()


def write(folder: Path, record: dict[str, Any]) -> None:
    """Writes the results so far."""
    (folder / "gpu_check.json").write_text(json.dumps(record, indent=2) + "\n")


def step(args: argparse.Namespace, name: str, end: float) -> dict[str, Any]:
    """Runs one step in a process of its own; returns its result, and the end of its output if it failed."""
    left = end - time.time()
    if left < 10:
        return {"not_run": "no time was left"}
    environment = {**os.environ, "PYTHONPATH": python_path()}
    environment["CUDA_VISIBLE_DEVICES"] = "" if args.device == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    started, log = time.time(), args.output / f"{name}.log"
    with open(log, "w") as file:
        try:
            run = dict(cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            failed = subprocess.run(command(args, name), timeout=min(left, LIMITS[name]), **run).returncode != 0
        except subprocess.TimeoutExpired:
            failed = True
    said, seconds = log.read_text(), time.time() - started
    return {"seconds": seconds, **result(args.output, name, said), **({"failed": said[-1500:]} if failed else {})}


def result(output: Path, name: str, said: str) -> dict[str, Any]:
    """A step's result, from its output and its files."""
    if name == TESTS:
        return {"summary": said.strip().splitlines()[-1], "failures": re.findall(r"^(?:FAILED|ERROR) .*", said, re.M)}
    if name in MAIN:
        metrics = output / name / "metrics.json"
        return {"metrics": json.loads(metrics.read_text())} if metrics.exists() else {}
    lines = [line for line in said.splitlines() if line.startswith('{"flags"')]
    return json.loads(lines[-1]) if lines else {}


def command(args: argparse.Namespace, name: str) -> list[str]:
    """A step's command line."""
    if name == TESTS:
        workers = ["-n", "6"] if find_spec("xdist") and not args.small else []
        return [sys.executable, "-m", "pytest", "tests/gpu", "-rfE", "--tb=short", *workers]
    if name in MAIN:
        flags = ["--output_dir", str(args.output / name), "--report_to", "none", "--validation_steps", "100000"]
        script = str(ROOT / "train_rdm_lora.py")
        return [sys.executable, script, *flags, *MAIN[name], *(SMALL if args.small else [])]
    own = [sys.executable, str(Path(__file__)), "--run", name, "--output", str(args.output)]
    return [*own, *(["--small"] if args.small else [])]


if __name__ == "__main__":
    main()
