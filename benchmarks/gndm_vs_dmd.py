"""GNDM against DMD on the tiny teacher at equal network calls, with paired seeds.

    python benchmarks/gndm_vs_dmd.py --seeds 5 --max_train_steps 400 --work_dir /tmp/gndm_vs_dmd

Both algorithms get the same rollouts, prompts, noises, numbers of updates and fake-score updates, and so the same
number of network calls; only the direction differs. Prints and writes every run and the paired differences.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import mean, stdev

from runs import measure_student, train_all, write_result

ALGORITHMS = ("dmd", "gndm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max_train_steps", type=int, default=400)
    parser.add_argument("--fake_updates_per_step", type=int, default=2)
    parser.add_argument("--num_images", type=int, default=5000)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--work_dir", type=Path, required=True, help="where the runs go; finished ones are kept")
    args = parser.parse_args()
    common = ["--max_train_steps", str(args.max_train_steps), "--report_to", "none", "--num_eval_images", "0",
              "--teacher_target", "score",
              "--fake_updates_per_step", str(args.fake_updates_per_step),
              "--checkpointing_steps", "1000000", "--validation_steps", "1000000"]  # fmt: skip
    runs = {
        f"{algorithm}-{seed}": [*common, "--algorithm", algorithm, "--seed", str(seed)]
        for seed in range(args.seeds)
        for algorithm in ALGORITHMS
    }
    results = train_all(runs, args.work_dir, args.jobs, threads=1)
    student = {name: measure_student(args.work_dir / name, args.num_images) for name in runs}
    write_result(
        "gndm_vs_dmd",
        {
            "settings": next(iter(results.values()))["arguments"],
            "students": student,
            "paired": {metric: paired(student, metric, args.seeds) for metric in ("fd_to_teacher", "fd_to_data")},
            "accuracy": {
                a: mean(student[f"{a}-{seed}"]["prompt_accuracy"] for seed in range(args.seeds)) for a in ALGORITHMS
            },
        },
    )


def paired(students: dict[str, dict], metric: str, seeds: int) -> dict:
    """Means of both, and 100 ln(gndm / dmd) with its standard error over seeds."""
    dmd, gndm = ([students[f"{a}-{seed}"][metric] for seed in range(seeds)] for a in ALGORITHMS)
    change = [100 * math.log(g / d) for g, d in zip(gndm, dmd, strict=True)]
    error = stdev(change) / math.sqrt(seeds) if seeds > 1 else None
    return {"dmd": mean(dmd), "gndm": mean(gndm), "change_100_ln": mean(change), "standard_error": error}


if __name__ == "__main__":
    main()
