"""What brings a student nearest to its guided teacher: R_dm guided by a constant, or a target learnt from its images.

    python benchmarks/guidance_study.py --work_dir guidance-study

Trains students of each tiny teacher for as many network calls, one for each constant and one for each target, and
measures each against the teacher's own images at the guidance scales 2, 4 and 8: `results/guidance_study.json`, which
docs/evidence.md sums up. The calls of a target's images and training come on top; `calls_before` has them, and one
constant of each teacher gets as many in all. Finished runs are kept in `--work_dir`. Run it in the repository's root.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from runs import standard_error, write_result
from safetensors.torch import load_file, save_file
from study_comparisons import GNDM, TARGET, TEACHERS

SCALES = (2.0, 4.0, 8.0)  # of the teacher's own sampling
CONSTANTS = (1.0, 1.5, 2.0, 3.0, 4.0, 8.0)  # in R_dm
BUDGET, IMAGES = 40_000, 2400
FIRST_SEED = 4_000_000  # of the images that students are measured against
RATES = {"tiny-flow": 2e-3}  # of students that start at the teacher; best in `method_study.py`
SMALL: dict[str, Any] = dict(
    num_target_images=2400, target_inference_steps=25, target_train_steps=500, target_batch_size=128
)
BEFORE = {
    "images": SMALL["num_target_images"] * SMALL["target_inference_steps"] * 2,
    "target": SMALL["target_train_steps"] * SMALL["target_batch_size"] * 2,
}
ALL = BUDGET + sum(BEFORE.values())
LONG = {"tiny": 1.5, "tiny-flow": 4.0, "tiny-v": 2.0}  # the constants that are best at 4: they get `ALL` the calls, too


def variants(teacher: str) -> dict[str, dict[str, Any]]:
    """The flags of each student by its name."""
    rate = RATES.get(teacher, 1e-3)
    plain = dict(GNDM, teacher_target="score", fake_score_steps=True, lr_scheduler="cosine", learning_rate=rate)
    learnt = GNDM | TARGET | SMALL | {"fake_learning_rate": rate, "learning_rate": rate / 2}
    return (
        {f"constant {scale:g}": dict(plain, guidance_scale=scale) for scale in CONSTANTS}
        | {f"constant {LONG[teacher]:g}, {ALL:,} calls": dict(plain, guidance_scale=LONG[teacher])}
        | {f"images at {scale:g}": learnt | {"guidance_scale": scale} for scale in SCALES}
    )


def reference(teacher: str, scale: float, folder: Path):
    """Statistics of the teacher's own images at a guidance scale; kept in the folder."""
    from rdm_diffusers.frechet import GaussianStatistics

    path = folder / f"reference-{teacher}-{scale:g}.safetensors"
    if not path.exists():
        from study_run import teacher_images

        from rdm_diffusers.tiny.classifier import load_classifier

        images = teacher_images(teacher, IMAGES, scale, FIRST_SEED)
        save_file(dict(vars(GaussianStatistics.of(load_classifier().features(images)))), path)
    return GaussianStatistics(**load_file(path))


def execute(result: Path, teacher: str, name: str, seed: int) -> None:
    """One run in a worker process, on one thread."""
    import torch
    from study_run import distil

    torch.set_num_threads(1)
    references = {f"fd_at_{scale:g}": reference(teacher, scale, result.parent) for scale in SCALES}
    with tempfile.TemporaryDirectory() as scratch:
        budget = ALL if name.endswith("calls") else BUDGET
        record = distil(
            teacher, seed, Path(scratch) / "run", budget, 1, IMAGES, variants(teacher)[name], references
        )  # fmt: skip
    result.write_text(json.dumps(record))
    print(result.stem, {key: round(record["curve"][-1][key], 2) for key in references}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--work_dir", type=Path, required=True, help="finished runs are kept here")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    runs = [
        (args.work_dir / f"{teacher}-{name.replace(' ', '-')}-{seed}.json", teacher, name, seed)
        for seed in range(args.seeds)
        for teacher in args.teachers
        for name in variants(teacher)
    ]
    for teacher in args.teachers:
        for scale in SCALES:
            reference(teacher, scale, args.work_dir)
    missing = [run for run in runs if not run[0].exists()]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(execute, *zip(*missing, strict=True)) if missing else ())
    write_down(args.work_dir)


def write_down(folder: Path) -> None:
    """Gathers every finished run into the result file."""
    record: dict[str, Any] = {
        "network_calls": BUDGET, "calls_before": BEFORE, "num_images": IMAGES, "teachers": {},
    }  # fmt: skip
    for teacher in TEACHERS:
        for name, flags in variants(teacher).items():
            found = sorted(folder.glob(f"{teacher}-{name.replace(' ', '-')}-*.json"))
            if found:
                runs = [json.loads(path.read_text()) for path in found]
                finals = [run["curve"][-1] for run in runs]
                values = {f"fd_at_{scale:g}": [final[f"fd_at_{scale:g}"] for final in finals] for scale in SCALES} | {
                    "prompt_accuracy": [final["prompt_accuracy"] for final in finals]
                }
                record["teachers"].setdefault(teacher, {})[name] = {
                    "flags": flags,
                    "seeds": [int(path.stem.rsplit("-", 1)[1]) for path in found],
                    "mean": {key: sum(each) / len(each) for key, each in values.items()},
                    "standard_error": {key: standard_error(each) for key, each in values.items()},
                }
    write_result("guidance_study", record)


if __name__ == "__main__":
    main()
