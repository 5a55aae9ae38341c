"""What each part of the method does: named comparisons with paired seeds at equal network calls, on the tiny teachers.

    python benchmarks/method_study.py --work_dir method-study                       # everything
    python benchmarks/method_study.py --work_dir method-study --comparisons main    # or some of it

Run it in the repository's root. A network call is one forward or one backward of one sample through the student, the
teacher or the fake score, rollouts included. Runs of one seed share their prompts and noises. Finished runs are kept in
`--work_dir`, so an interrupted study continues where it stopped, and more seeds only add runs. Writes
`results/method_study.json` with every setting.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from runs import RESULTS, paired_change, standard_error, write_result

from rdm_diffusers.evaluation.report import machine

TEACHERS = ("tiny", "tiny-flow", "tiny-v")
STUDIED = ("tiny", "tiny-flow")
RATES: dict[str, dict[str, Any]] = {"tiny-flow": dict(learning_rate=2e-3)}  # best for both methods there
# Each at the number of fake-score updates that was best for it in `tuning`.
DMD, GNDM = dict(algorithm="dmd", fake_updates_per_step=5), dict(algorithm="gndm", fake_updates_per_step=1)
BOLD = dict(GNDM, algorithm="gndmr", reward="tiny_bold")
QUICK = dict(DMD, fake_updates_per_step=2, fake_rate_ratio=2)
BLACK_BOX = dict(BOLD, reward="benchmarks/study_rewards.py:bold_black_box")
DMDR = dict(DMD, algorithm="gndmr", preset="dmd2", reward="tiny_bold", reward_combination="sum")
# Student and fake score start at the target, and only the fake score has to be quick.
TARGET: dict[str, Any] = dict(
    teacher_target="samples", guidance_scale=4.0, fake_score_steps=True, fake_learning_rate=1e-3, lr_scheduler="cosine"
)  # fmt: skip
LAMBDAS = {"0": dict(gndm_lambda=0.0), "0.25": dict(gndm_lambda=0.25), "0.5": dict(gndm_lambda=0.5),
           "1": dict(gndm_lambda=1.0), "James-Stein": dict(gndm_lambda="james_stein"),
           "1 pooled": dict(gndm_lambda=1.0, debias_pool=4)}  # fmt: skip
# Flags of release 0.1.0 only. Their finished runs are still summarised; no new ones are started.
RETIRED = (
    {"gndm_lambda": "james_stein"}, {"debias_pool": 4}, {"black_box_form": "group"}, {"black_box_form": "perturbation"},
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Variants by name, the first of which the others are compared with.

    Args:
        variants: flags of `train_rdm_lora.py` by variant.
        budget: network calls of each run.
        marks: how many times a run is measured.
        images: pictures per measurement.
        about: what the comparison asks.
    """

    about: str
    variants: dict[str, dict[str, Any]]
    budget: int = 24_000
    marks: int = 1
    images: int = 960
    teachers: tuple[str, ...] = STUDIED


def rates(best: float) -> dict[str, dict[str, Any]]:
    """Learning rates x4 around the best one with 1, 2 and 5 fake updates; and fake scores that learn faster."""
    grid = {
        f"{base['algorithm']}, lr {rate:g}, {fake} fake updates": dict(
            base, learning_rate=rate, fake_updates_per_step=fake
        )
        for base in (DMD, GNDM)
        for rate in (best / 2, best, best * 2)
        for fake in (1, 2, 5)
    }
    return grid | {
        f"{base['algorithm']}, lr {best:g}, fake score's x {ratio}, {fake} fake updates": dict(
            base, learning_rate=best, fake_updates_per_step=fake, fake_learning_rate=ratio * best
        )
        for base in (DMD, GNDM)
        for ratio in (2,)
        for fake in (1, 2)
    }


def target_rates(fake_rate: float) -> dict[str, dict[str, Any]]:
    """Learning rates and fake updates where student and fake score start at a target that is learnt."""
    grid = {
        f"{base['algorithm']}, lr {rate:g}, {fake} fake updates": dict(
            base, **TARGET | {"fake_learning_rate": fake_rate}, learning_rate=rate, fake_updates_per_step=fake
        )
        for base in (DMD, GNDM)
        for rate in (2.5e-4, 5e-4, 1e-3, 2e-3)
        for fake in (1, 2, 5)
    }
    return grid | {
        f"{base['algorithm']}, lr {rate:g}, fake score's x 2, {fake} fake updates": dict(
            base, **TARGET | {"fake_learning_rate": 2 * fake_rate}, learning_rate=rate, fake_updates_per_step=fake
        )
        for base in (DMD, GNDM)
        for rate in (5e-4, 1e-3)
        for fake in (1, 2)
    }


COMPARISONS = {
    "main": Comparison(
        "GNDM's default against DMD, each at its best learning rate and number of fake updates of `tuning`",
        {"DMD": DMD, "GNDM": GNDM, "DMD, 2 quicker fake updates": QUICK},
        budget=60_000,
        marks=6,
        teachers=TEACHERS,
    ),
    "tuning": Comparison("learning rates and fake updates", rates(1e-3), budget=40_000, marks=2, teachers=("tiny",)),
    "tuning, flow": Comparison("the same", rates(2e-3), budget=40_000, marks=2, teachers=("tiny-flow",)),
    "lambda": Comparison(
        "the strength of the correction against the number of fake updates",
        {
            f"lambda {name}, {fake} fake updates": dict(GNDM, fake_updates_per_step=fake, **flags)
            for fake in (1, 2, 5)
            for name, flags in LAMBDAS.items()
        },
    ),
    "ablation": Comparison(
        "which reading of the group brings what, at 1 fake update",
        {
            "DMD": dict(DMD, fake_updates_per_step=1),
            "group normaliser alone": dict(GNDM, gndm_lambda=0.0),
            "std normaliser alone": dict(preset="gndm-literal", fake_updates_per_step=1),
            "k-conditioned fake score alone": dict(DMD, fake_updates_per_step=1, fake_score_steps=True),
            "correction alone": dict(GNDM, advantage_normalization="sample"),
            "correction in noise units": dict(GNDM, bias_estimator="noise"),
            "correction and group normaliser": GNDM,
            "all three": dict(GNDM, fake_score_steps=True),
            "correction by each step alone": dict(GNDM, pool_steps=0.0),
            "correction by all steps": dict(GNDM, pool_steps=1.0),
            "2 re-noisings": dict(GNDM, num_renoisings=2),
        },
    ),
    "pooling": Comparison(
        "the share of the bias that is measured over all states of a rollout, in longer runs",
        {"half": GNDM} | {name: dict(GNDM, pool_steps=share) for name, share in (("none", 0.0), ("all", 1.0))},
        budget=60_000,
        marks=6,
    ),
    "groups": Comparison(
        "the group's size, at 1 fake update",
        {"G 4": GNDM} | {f"G {size}": dict(GNDM, group_size=size) for size in (2, 8)},
    ),
    "steps": Comparison(
        "students of fewer steps, at 1 fake update",
        {
            f"{steps} steps, lambda {strength}": dict(
                GNDM, num_student_steps=steps, steps_per_rollout=steps, gndm_lambda=strength
            )
            for steps in (1, 2)
            for strength in (0.0, 1.0)
        },
    ),
    "guided": Comparison(
        "the teacher guided by 2 in R_dm, measured against its samples under its own, stronger guidance",
        {"DMD": dict(DMD, guidance_scale=2.0), "GNDM": dict(GNDM, guidance_scale=2.0)},
        budget=60_000,
        marks=6,
    ),
    "tuning, target": Comparison(
        "learning rates and fake updates with a target learnt from the teacher's images at guidance 4",
        target_rates(1e-3),
        budget=40_000,
        images=2400,
        teachers=("tiny",),
    ),
    "tuning, target, flow": Comparison(
        "the same", target_rates(2e-3), budget=40_000, images=2400, teachers=("tiny-flow",)
    ),
    "pareto": Comparison(
        "GNDMR against DMDR's weighted sum, and against the same sum with GNDM: tiny_bold against the distance",
        {f"DMDR {w:g}": dict(DMDR, reward=f"tiny_bold:{w:g}") for w in (0.03, 0.1, 0.3, 1.0)}
        | {f"sum {w:g}": dict(BOLD, reward=f"tiny_bold:{w:g}", reward_combination="sum") for w in (0.1, 0.3, 1.0)}
        | {f"GNDMR {rho:g}": dict(BOLD, reward_share=rho) for rho in (0.05, 0.1, 0.2, 0.4)},
    ),
    "rewards": Comparison(
        "rewards scaled, conflicting, and as black boxes",
        {
            "share 0.2": dict(BOLD, reward_share=0.2),
            "share 0.2, guarded": dict(BOLD, reward_share=0.2, projection_guard=True),
            "share 0.2, reward x 100": dict(BOLD, reward="benchmarks/study_rewards.py:bold_100"),
            "no reward": GNDM,
            "prompt and bold": dict(BOLD, reward=["tiny_prompt", "tiny_bold"]),
        }
        | {f"black box, {form}": dict(BLACK_BOX, black_box_form=form) for form in ("group", "perturbation")}
        | {f"black box, tilt {kappa:g}": dict(BLACK_BOX, reward_tilt=kappa) for kappa in (0.25, 0.5, 1.0)},
    ),
    "reuse": Comparison(
        "one rollout for N updates, with and without importance weights",
        {"N 1": GNDM}
        | {
            f"N {n}, {weighting}": dict(GNDM, reuse_rollouts=n, importance_weighting=weighting)
            for n in (2, 4, 8)
            for weighting in ("none", "clipped")
        },
    ),
}


def flags_of(teacher: str, flags: dict[str, Any]) -> dict[str, Any]:
    """A variant's flags on one teacher; `fake_rate_ratio` is the fake score's learning rate over the student's."""
    own = RATES.get(teacher, {}) | flags
    ratio = own.pop("fake_rate_ratio", None)
    return own if ratio is None else own | {"fake_learning_rate": ratio * own.get("learning_rate", 1e-3)}


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
        metrics = [key for key, value in next(iter(finals.values())).items() if isinstance(value, float)]
        entry = {
            "flags": comparison.variants[name],
            "seeds": sorted(finals),
            "not_finite": [seed for seed, run in by_seed.items() if not run["finite"]],
            "mean": {m: mean(point[m] for point in finals.values()) for m in metrics},
            "standard_error": {m: standard_error([point[m] for point in finals.values()]) for m in metrics},
            "curves": {seed: run["curve"] for seed, run in by_seed.items()},
        }
        shared = sorted(set(finals) & set(runs[first]))
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
                chosen = [
                    flags for name, flags in comparison.variants.items()
                    if re.search(args.only, name) and not any(old.items() <= flags.items() for old in RETIRED)
                ]  # fmt: skip
                for flags in (flags_of(teacher, flags) for flags in chosen):
                    path = run_of(teacher, seed, comparison, flags, args.work_dir)
                    runs[path] = (path, teacher, seed, comparison.budget, comparison.marks, comparison.images, flags)
    return [run for path, run in runs.items() if not path.exists()]


def write_down(args: argparse.Namespace) -> None:
    """Gathers every finished run into the result file, where comparisons without one keep their figures."""
    path = RESULTS / "method_study.json"
    before = json.loads(path.read_text()) if path.exists() else {"comparisons": {}}
    record: dict = {"comparisons": {}}
    if "common_arguments" in before:
        record["common_arguments"] = before["common_arguments"]
    for old in before["comparisons"].values():
        old.setdefault("machine", before["machine"])
    known = before.get("floor", {})
    record["floor"] = known | {t: floor(t, Comparison.images, args.work_dir) for t in args.teachers if t not in known}
    for name, comparison in COMPARISONS.items():
        entry: dict = {
            "about": comparison.about, "network_calls": comparison.budget, "num_images": comparison.images,
            "machine": machine(),
        }  # fmt: skip
        for teacher in comparison.teachers:
            runs: dict[str, dict[int, dict]] = {}
            for variant, flags in comparison.variants.items():
                for seed in range(100):
                    path = run_of(teacher, seed, comparison, flags_of(teacher, flags), args.work_dir)
                    if path.exists():
                        found = json.loads(path.read_text())
                        record.setdefault("common_arguments", found["arguments"])
                        runs.setdefault(variant, {})[seed] = found
            if next(iter(comparison.variants)) in runs:
                entry[teacher] = summary(comparison, runs)
        finished = any(teacher in entry for teacher in comparison.teachers)
        record["comparisons"][name] = entry if finished else before["comparisons"].get(name, entry)
    write_result("method_study", record)


if __name__ == "__main__":
    main()
