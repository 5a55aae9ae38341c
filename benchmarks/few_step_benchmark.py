"""Few-step methods on the same teachers at equal network calls: a search, and then paired seeds at its best setting.

    python benchmarks/few_step_benchmark.py --work_dir few-step                          # all of it: days on one core
    python benchmarks/few_step_benchmark.py --work_dir few-step --max_hours 8            # a part of it
    python benchmarks/few_step_benchmark.py --work_dir few-step --methods dmd gndm --teachers tiny --seeds 1
    python benchmarks/few_step_page.py                                                   # docs/benchmark.md

Run it in the repository's root. `few_step_methods.py` has the tables of methods, teachers, guidance and searches. A run
ends at the update at which its network calls reach `--calls`: forwards and backwards of single samples through all
networks, counted. The search is the same small grid for every method, at one seed that is not compared afterwards.

Every finished run is written into `results/few_step_benchmark.json` at once and is never run again, so the benchmark
may be interrupted, go on another day, and gain methods, teachers and seeds. `--work_dir` only caches what runs share
(the teacher's pictures, a learnt target) and may be deleted. `--forget REGEX` drops runs whose code was wrong; their
keys are `stage/teacher/guidance/steps/method/seed/digest`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from few_step_methods import (
    GUIDANCE,
    METHODS,
    PICTURED_SEED,
    PICTURED_STEPS,
    STEPS,
    TEACHERS,
    Job,
    Plan,
    best_choice,
    final_job,
    scale_of,
    search_jobs,
)
from few_step_results import Results
from runs import RESULTS
from study_run import COMMON, CallBudget, Study, calls_before, draw, followed, measure_teacher

from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.evaluation.pictures import to_pil
from rdm_diffusers.folders import locked
from rdm_diffusers.training.validation import averaged_student

RESULT = RESULTS / "few_step_benchmark.json"
PICTURES = RESULTS / "few_step_pictures"
MARKS = (1 / 8, 1 / 4, 1 / 2, 1)  # of the network calls
LEAST_CALLS = 4000  # of a run, so that no update passes two marks
SHOWN = (0, 67, 134, 201)  # captions of the pictures


def execute(job: Job, cache: Path, pictures: Path) -> dict[str, Any]:
    """One run in this process; its record, without the curve's other metrics.

    Raises:
        RuntimeError: if it ended before it had made its network calls.
    """
    torch.set_num_threads(1)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        most = -(-job.calls // COMMON["train_batch_size"])  # an update makes more calls than it has samples
        config = parse_args(job.command_line(Path(scratch) / "run", cache_dir=cache, max_train_steps=most))
        marks = [round(share * job.calls) for share in (MARKS if job.stage == "final" else MARKS[-1:])]
        study = Study(config, job.images, callbacks=[CallBudget(marks)])
        found = followed(study)
        if found["finite"] and sum(study.networks.calls.values()) < job.calls:
            raise RuntimeError(f"{job.key} ended before {job.calls} network calls.")
        if found["finite"] and job.stage == "final" and job.seed == PICTURED_SEED and job.steps in PICTURED_STEPS:
            save_pictures(study, pictures / f"{job.teacher}-{job.guidance}-{job.steps}-{job.method}.png")
    return {**compact(study, found), "processor_seconds": round(time.process_time() - began, 1)}


def compact(study: Study, found: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings, costs and last metrics, and only the distances of its curve."""
    curve = found["curve"]
    last = curve[-1] if found["finite"] else {}
    return {
        "finite": found["finite"], "alarms": len(found["alarms"]), "updates": study.state.update,
        "network_calls": last.get("calls", {}), "preparation": calls_before(study.config),
        "final": {name: round(value, 4) for name, value in last.items() if isinstance(value, float)},
        "curve": [[point["network_calls"], round(point["fd_to_teacher"], 3)] for point in curve],
    }  # fmt: skip


def save_pictures(study: Study, path: Path) -> None:
    """A strip of the student's pictures, from the same captions and noises for every student of a teacher."""
    with torch.no_grad(), averaged_student(study.distillation, study.state):
        images = draw(study.distillation, study.teacher, 0)[list(SHOWN)]
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(torch.cat(list(images), dim=2)).save(path, optimize=True)


def measure_teachers(results: Results, plan: Plan, teachers: Sequence[str], guidance: Sequence[str]) -> None:
    """The teachers' own 50-step pictures from other seeds than their references': no student can be nearer."""
    for teacher in teachers:
        for name in guidance:
            known = results.teachers.setdefault(teacher, {}).setdefault(name, {})
            if str(plan.images) not in known:
                known[str(plan.images)] = measure_teacher(teacher, plan.images, scale_of(teacher, name))
                results.save(plan)


def chosen(args: argparse.Namespace) -> list[tuple[str, str, int, str]]:
    """The teachers, guidances, steps and methods that were chosen and go together."""
    every = product(args.teachers, args.guidance, args.steps, args.methods)
    return [cell for cell in every if cell[1] in METHODS[cell[3]].guidance]


def searches(args: argparse.Namespace, plan: Plan) -> list[Job]:
    """All runs of the search, a setting of every method after the other."""
    found = [search_jobs(plan, *cell) for cell in chosen(args)]
    return list({job.key: job for jobs in zip(*found, strict=True) for job in jobs}.values())


def finals(args: argparse.Namespace, plan: Plan, results: Results) -> list[Job]:
    """All runs that are compared, seed after seed.

    Raises:
        SystemExit: if a search is not finished.
    """
    choices = {cell: best_choice(search_jobs(plan, *cell), results.runs) for cell in chosen(args)}
    jobs = []
    for seed, (cell, choice) in product(range(args.seeds), choices.items()):
        if choice is None:
            sys.exit(f"The search for {cell[3]} on {cell[0]} is not finished; run it with --stages search.")
        jobs.append(final_job(plan, *cell, seed, choice))
    return jobs


def run_jobs(jobs: Sequence[Job], args: argparse.Namespace, results: Results, deadline: float) -> list[str]:
    """Runs those jobs that are not finished, and keeps each at once; the errors of those that failed."""
    queue = deque(job for job in jobs if job.key not in results.runs)
    running: dict[Future[dict[str, Any]], Job] = {}
    failed = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        while True:
            while queue and len(running) < args.jobs and time.monotonic() < deadline:
                job = queue.popleft()
                running[pool.submit(execute, job, args.work_dir / "cache", args.pictures)] = job
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                error = future.exception()
                if error is not None:
                    failed.append(f"{job.key}: {error!r}")
                    print(failed[-1], flush=True)
                    continue
                results.add(job, future.result())
                results.save(args.plan)
                print(job.key, future.result()["curve"], f"{len(queue)} to start", flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=("search", "final"), default=["search", "final"])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--teachers", nargs="+", choices=tuple(TEACHERS), default=list(TEACHERS))
    parser.add_argument("--guidance", nargs="+", choices=tuple(GUIDANCE), default=list(GUIDANCE))
    parser.add_argument("--steps", nargs="+", type=int, choices=STEPS, default=list(STEPS), help="of the student")
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds that are compared, from 0 on")
    parser.add_argument("--calls", type=int, default=Plan.calls, help="network calls of a run")
    parser.add_argument("--search_calls", type=int, default=Plan.search_calls, help="network calls of a search's run")
    parser.add_argument("--images", type=int, default=Plan.images, help="pictures in a measurement, a multiple of 240")
    parser.add_argument("--search_steps", type=int, choices=(0, *STEPS), default=Plan.search_steps,
                        help="the student's steps in the search; 0 searches at every number of steps")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--max_hours", type=float, default=float("inf"), help="start no run after so many hours")
    parser.add_argument("--work_dir", type=Path, required=True, help="caches what runs share; may be deleted")
    parser.add_argument("--results", type=Path, default=RESULT, help="the file of finished runs")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="the folder of the students' pictures")
    parser.add_argument("--forget", metavar="REGEX", help="first drop the finished runs whose keys have this")
    parser.add_argument("--summarise", action="store_true", help="run nothing; write down what is finished")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.calls, args.search_calls) < LEAST_CALLS:
        parser.error(f"--calls and --search_calls must be at least {LEAST_CALLS}.")
    args.plan = Plan(args.calls, args.search_calls, args.images, args.search_steps or None)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    with locked(args.work_dir / "lock", refusal="Another benchmark ({holder}) uses this --work_dir."):
        failed = benchmark(args)
    if failed:
        sys.exit(f"{len(failed)} runs failed and will be started again next time. The first: {failed[0]}")


def benchmark(args: argparse.Namespace) -> list[str]:
    """The chosen stages; the errors of runs that failed."""
    results, deadline, failed = Results(args.results), time.monotonic() + 3600 * args.max_hours, list[str]()
    if args.forget:
        results.runs = {key: run for key, run in results.runs.items() if not re.search(args.forget, key)}
    if not args.summarise:
        for job in (jobs := searches(args, args.plan)):
            parse_args(job.command_line(args.work_dir / "run"))  # ends the program where a flag is wrong
        measure_teachers(results, args.plan, args.teachers, args.guidance)
        if "search" in args.stages:
            failed = run_jobs(jobs, args, results, deadline)
        if "final" in args.stages and not failed and time.monotonic() < deadline:
            failed = run_jobs(finals(args, args.plan, results), args, results, deadline)
    results.save(args.plan)
    return failed


if __name__ == "__main__":
    main()
