"""What each part of the method does: named comparisons with paired seeds at equal network calls, on the tiny teachers.

    python benchmarks/method_study.py --work_dir method-study                       # everything
    python benchmarks/method_study.py --work_dir method-study --comparisons main    # or some of it

Run it in the repository's root. A network call is one forward or one backward of one sample through the student, the
teacher or the fake score, rollouts included. Runs of one seed share their prompts and noises. Finished runs are kept in
`--work_dir`, so an interrupted study continues where it stopped, and more seeds only add runs. Writes
`results/method_study.json` with every setting. The table of a comparison needs all its runs from one release.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from runs import RESULTS, means_of, paired_change, write_result
from study_comparisons import COMPARISONS, RATES, TEACHERS, Comparison

from rdm_diffusers.evaluation.report import machine


def flags_of(teacher: str, flags: dict[str, Any]) -> dict[str, Any]:
    """A variant's flags on one teacher; `rate_ratio` multiplies the teacher's learning rate."""
    own = RATES.get(teacher, {}) | flags
    ratio = own.pop("rate_ratio", None)
    return own if ratio is None else own | {"learning_rate": ratio * own.get("learning_rate", 1e-3)}


def run_of(teacher: str, seed: int, comparison: Comparison, flags: dict[str, Any], folder: Path) -> Path:
    """The file of a run's result, which comparisons with the same run share."""
    key = json.dumps([teacher, seed, comparison.budget, comparison.marks, comparison.images, flags], sort_keys=True)
    return folder / f"{teacher}-{seed}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def execute(result: Path, teacher: str, seed: int, budget: int, marks: int, images: int, flags: dict) -> None:
    """One run in a worker process, on one thread."""
    import torch
    from study_run import distil

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        record = distil(teacher, seed, Path(scratch) / "run", budget, marks, images, flags)
    result.write_text(json.dumps(record))
    print(result.stem, flags, [round(point["fd_to_teacher"], 2) for point in record["curve"]], flush=True)


def floor(teacher: str, images: int, folder: Path) -> dict:
    """The metrics of the unguided teacher at 50 steps and other seeds: the noise floor of the distances."""
    result = folder / f"floor-{teacher}-{images}.json"
    if not result.exists():
        from study_run import measure_teacher

        result.write_text(json.dumps(measure_teacher(teacher, images)))
    return json.loads(result.read_text())


def summary(comparison: Comparison, runs: dict[str, dict[int, dict]]) -> dict:
    """Per variant: its settings, every seed's curve, means, and the paired change against the first variant."""
    first = next(iter(comparison.variants))
    record: dict = {}
    for name, by_seed in runs.items():
        finals = {seed: run["curve"][-1] for seed, run in by_seed.items() if run["curve"]}
        if not finals:
            continue
        entry = {
            "flags": comparison.variants[name],
            "seeds": sorted(finals),
            "not_finite": [seed for seed, run in by_seed.items() if not run["finite"]],
            **means_of(list(finals.values())),
            "curves": {seed: run["curve"] for seed, run in by_seed.items()},
        }
        if any(run.get("ratios") for run in by_seed.values()):
            entry["ratios"] = {seed: run["ratios"] for seed, run in by_seed.items()}
        shared = sorted(set(finals) & set(runs.get(first, ())))
        if name != first and shared:
            distances = [finals[seed]["fd_to_teacher"] for seed in shared]
            baseline = [runs[first][seed]["curve"][-1]["fd_to_teacher"] for seed in shared]
            entry["against_first"] = {**paired_change(distances, baseline), "seeds": len(shared)}
        record[name] = entry
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", nargs="+", choices=tuple(COMPARISONS), default=list(COMPARISONS))
    parser.add_argument("--only", default="", help="run only variants that match this regular expression")
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--work_dir", type=Path, required=True, help="finished runs are kept here")
    parser.add_argument("--summarise", action="store_true", help="run nothing; write down what is finished")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    if not args.summarise:
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            list(pool.map(execute, *zip(*pending(args), strict=True)) if pending(args) else ())
    write_down(args)


def pending(args: argparse.Namespace) -> list[tuple]:
    """The runs that are not finished, seed after seed, so that an interrupted study is balanced."""
    runs = {}
    for name in args.comparisons:
        comparison = COMPARISONS[name]
        for seed in range(args.seeds):
            for teacher in [teacher for teacher in args.teachers if teacher in comparison.teachers]:
                chosen = [flags for variant, flags in comparison.variants.items() if re.search(args.only, variant)]
                for flags in (flags_of(teacher, flags) for flags in chosen):
                    path = run_of(teacher, seed, comparison, flags, args.work_dir)
                    runs[path] = (path, teacher, seed, comparison.budget, comparison.marks, comparison.images, flags)
    return [run for path, run in runs.items() if not path.exists()]


def gathered(comparison: Comparison, folder: Path) -> dict:
    """Every finished run of a comparison, summed up for each teacher; `arguments` are all settings of one of them."""
    record: dict = {
        "about": comparison.about, "network_calls": comparison.budget, "num_images": comparison.images,
        "machine": machine(),
    }  # fmt: skip
    for teacher in comparison.teachers:
        runs: dict[str, dict[int, dict]] = {}
        for variant, flags in comparison.variants.items():
            for seed in range(100):
                path = run_of(teacher, seed, comparison, flags_of(teacher, flags), folder)
                if path.exists():
                    runs.setdefault(variant, {})[seed] = json.loads(path.read_text())
        if runs:
            record.setdefault("arguments", next(iter(next(iter(runs.values())).values()))["arguments"])
            record[teacher] = summary(comparison, runs)
    return record


def write_down(args: argparse.Namespace) -> None:
    """Gathers every finished run into the result file, where comparisons without one keep their figures."""
    path = RESULTS / "method_study.json"
    before = json.loads(path.read_text()) if path.exists() else {"comparisons": {}}
    known = before.get("floor", {})
    floors = {t: floor(t, Comparison.images, args.work_dir) for t in args.teachers if t not in known}
    found = {name: gathered(comparison, args.work_dir) for name, comparison in COMPARISONS.items()}
    kept = before["comparisons"]
    comparisons = {
        name: entry if "arguments" in entry else kept[name] for name, entry in found.items()
        if "arguments" in entry or name in kept
    }  # fmt: skip
    write_result("method_study", {"floor": known | floors, "comparisons": comparisons})


if __name__ == "__main__":
    main()
