"""The main job on the tiny teacher with R_dm's two targets: the guided score, and the score of the teacher's images.

    python benchmarks/learnt_target.py --work_dir learnt-target --seeds 5

Finished runs are kept in `--work_dir`. Runs of all seeds share the teacher's images and the target. A network call is
one forward or one backward of one sample; those for images and target are counted in full for each run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

from runs import paired_change, standard_error, train_all, words_of, write_result

METRICS = ("fd_to_teacher", "fd_to_data", "prompt_accuracy")
VARIANTS: dict[str, dict[str, Any]] = {
    "score": dict(teacher_target="score", guidance_scale=2),  # the constant that works best here
    "samples": dict(teacher_target="samples", guidance_scale=4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--work_dir", type=Path, required=True, help="where the runs go; finished ones are kept")
    args = parser.parse_args()
    runs = {
        f"{name}-{seed}": words_of({**VARIANTS[name], "seed": seed, "report_to": "none", "validation_steps": 10**6,
                                    "cache_dir": args.work_dir / "cache"})
        for seed in range(args.seeds)
        for name in args.variants
    }  # fmt: skip
    found = train_all(dict(list(runs.items())[:1]), args.work_dir, 1, threads=args.jobs)  # fills the cache
    found |= train_all(runs, args.work_dir, args.jobs, threads=1)
    students = {name: {"student": of["student"], "calls": calls(of["arguments"])} for name, of in found.items()}
    record: dict[str, Any] = {"settings": next(iter(found.values()))["arguments"], "runs": students}
    for name in args.variants:
        values = {m: [students[f"{name}-{s}"]["student"][m] for s in range(args.seeds)] for m in METRICS}
        record[name] = {m: {"mean": mean(v), "standard_error": standard_error(v)} for m, v in values.items()}
    if len(args.variants) > 1:
        each = [[students[f"{n}-{s}"]["student"]["fd_to_teacher"] for s in range(args.seeds)] for n in VARIANTS]
        record["samples_beside_score"] = paired_change(each[1], each[0])
    write_result("learnt_target", record)


def calls(arguments: dict[str, Any]) -> dict[str, int]:
    """The network calls of a run, by what they are for."""
    samples = arguments["train_batch_size"] * arguments["gradient_accumulation_steps"]
    learns = arguments["teacher_target"] == "samples"
    real = 1 if learns or arguments["guidance_scale"] == 1 else 2
    update = samples * (1 + real + 1 + 2 + 2 * arguments["fake_updates_per_step"])
    parts = {"distillation": arguments["max_train_steps"] * update}
    if learns:
        parts["images"] = arguments["num_target_images"] * arguments["target_inference_steps"] * 2
        parts["target"] = arguments["target_train_steps"] * (arguments["target_batch_size"] or samples) * 2
    return {**parts, "all": sum(parts.values())}


if __name__ == "__main__":
    main()
