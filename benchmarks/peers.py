"""Measures students that other projects' own code distilled from our tiny teachers: `results/peers.json`.

    python benchmarks/peers.py --work_dir peers

No peer's code is in this repository. Whoever runs one leaves a folder for each run in `--work_dir`:

    student/     a stock pipeline, with the scheduler of its few steps, and a LoRA's `pytorch_lora_weights.safetensors`
                 if it has one
    peer.json    the fields of `Run`

The pictures are measured as those of our own short runs are (`study_run.measure_images`), against the teacher without
guidance. Runs that differ in nothing but their seeds and what they spent are one row. Measured runs are kept.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers import DiffusionPipeline
from runs import standard_error, write_result
from study_run import measure_images

from rdm_diffusers.evaluation import evaluation_prompts
from rdm_diffusers.evaluation.subjects import Sampler
from rdm_diffusers.families import LORA_FILE
from rdm_diffusers.tiny import MAX_SEQUENCE_LENGTHS
from rdm_diffusers.tiny.reference import REFERENCES

FIRST_SEED = 1_000_000  # of the pictures
METRICS = ("fd_to_teacher", "fd_to_data", "prompt_accuracy")
COLUMNS = ("peer", "teacher", "what was run", "network calls", "seeds", *METRICS)
PER_RUN = ("seed", "updates", "network_calls", "seconds")


@dataclass(frozen=True)
class Run:
    """One run of a peer's code.

    Args:
        name: the peer's.
        version: a release or a commit.
        source: where the code is from.
        licence: of the code.
        teacher: an embedded teacher's name.
        variant: what distinguishes the row from the peer's others.
        command: exactly what was run.
        changes: what was changed in the peer's code or left out of it.
        num_inference_steps: of the student.
        call_options: further arguments of the pipeline's call.
        seed: of the training.
        updates: of the student.
        network_calls: forwards and backwards of single samples, by role and kind, as the run counted them.
        seconds: of the training, without loading.
    """

    name: str
    version: str
    source: str
    licence: str
    teacher: str
    variant: str
    command: str
    changes: list[str]
    num_inference_steps: int
    call_options: dict[str, Any]
    seed: int
    updates: int
    network_calls: dict[str, int]
    seconds: float

    @property
    def row(self) -> dict[str, Any]:
        """What runs of one row share."""
        shared = {name: value for name, value in vars(self).items() if name not in PER_RUN}
        return shared | {"command": self.command.replace(f"--seed {self.seed}", "--seed SEED")}


def read_run(folder: Path) -> Run:
    """The description of a run; ValueError if a field is missing or unknown, or if the teacher is not embedded."""
    try:
        run = Run(**json.loads((folder / "peer.json").read_text()))
    except TypeError as error:
        raise ValueError(f"{folder / 'peer.json'} does not have the fields of a run ({error}).") from error
    if run.teacher not in REFERENCES:
        raise ValueError(f"{folder / 'peer.json'} names the teacher {run.teacher}; use one of {', '.join(REFERENCES)}.")
    return run


def load_student(folder: Path, run: Run) -> Sampler:
    """The stock pipeline in `folder`, with its LoRA if there is one."""
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **REFERENCES[run.teacher].load_options)
    if (folder / LORA_FILE).exists():
        pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
    lengths = {"max_sequence_length": MAX_SEQUENCE_LENGTHS[run.teacher]} if run.teacher in MAX_SEQUENCE_LENGTHS else {}
    options = {"guidance_scale": 1.0, **lengths, **run.call_options}
    return Sampler(pipeline, run.num_inference_steps, guided=False, batch_size=240, call_options=options)


def measure_run(folder: Path, run: Run, num_images: int) -> dict[str, float]:
    """Distances and accuracy of a student's pictures of all captions in turn; kept in the folder."""
    result = folder / f"measured-{num_images}.json"
    if not result.exists():
        torch.manual_seed(FIRST_SEED)  # of a scheduler that takes no generator
        sampler = load_student(folder / "student", run)
        images = sampler(evaluation_prompts(num_images), range(FIRST_SEED, FIRST_SEED + num_images))[0]
        result.write_text(json.dumps(measure_images(images, run.teacher, "teacher_unguided")))
    return json.loads(result.read_text())


def summarise(measured: list[tuple[Run, dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each set of runs that share everything but their seeds, with means and standard errors."""
    in_order = sorted(measured, key=lambda each: (json.dumps(each[0].row, sort_keys=True), each[0].seed))
    rows = []
    for key, grouped in groupby(in_order, lambda each: each[0].row):
        runs, metrics = zip(*grouped, strict=True)
        values = {name: [each[name] for each in metrics] for name in metrics[0]}
        rows.append({
            **key, "seeds": [run.seed for run in runs], "updates": runs[0].updates,
            "network_calls": runs[0].network_calls, "all_network_calls": sum(runs[0].network_calls.values()),
            "seconds": [run.seconds for run in runs], "values": values,
            "mean": {name: mean(each) for name, each in values.items()},
            "standard_error": {name: standard_error(each) for name, each in values.items()},
        })  # fmt: skip
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows for docs/benchmark.md, each value with its standard error if there are several seeds."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        measured = [number(row["mean"][name], row["standard_error"][name]) for name in METRICS]
        facts = [row["name"], row["teacher"], row["variant"], f"{row['all_network_calls']:,}", str(len(row["seeds"]))]
        lines.append(f"| {' | '.join(facts + measured)} |")
    return "\n".join(lines)


def number(value: float, error: float | None) -> str:
    """A value with its standard error, if it has one."""
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


def main() -> None:
    """Measures all runs in `--work_dir`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="has a folder for each run")
    parser.add_argument("--num_images", type=int, default=960, help="pictures measured; a multiple of 240")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = {file.parent: read_run(file.parent) for file in sorted(args.work_dir.glob("*/peer.json"))}
    if not runs:
        parser.error(f"{args.work_dir} has no folder with a peer.json.")
    measured = [(run, measure_run(folder, run, args.num_images)) for folder, run in runs.items()]
    rows = summarise(measured)
    write_result("peers", {"num_images": args.num_images, "peers": rows})
    print(as_table(rows))


if __name__ == "__main__":
    main()
