"""The few-step benchmark's file of results: every finished run with its settings, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from few_step_methods import (
    BASELINE,
    GUIDANCE,
    METHODS,
    STEPS,
    TEACHERS,
    Flags,
    Job,
    Plan,
    best_choice,
    final_job,
    search_jobs,
)
from runs import means_of, paired_change
from study_run import COMMON

from rdm_diffusers.evaluation.report import machine
from rdm_diffusers.folders import write_whole

COMMAND = "python benchmarks/few_step_benchmark.py --work_dir few-step"
PACKAGES = ("rdm_diffusers", "torch", "diffusers", "peft")
SEEDS = 100  # more than anybody runs
METRIC = "fd_to_teacher"


class Results:
    """The runs that are finished. They stay in the file, one a line, and are never run again.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = json.loads(path.read_text()) if path.exists() else {}
        self.runs: dict[str, dict[str, Any]] = found.get("runs", {})
        self.teachers: dict[str, dict[str, Any]] = found.get("teachers", {})
        self.machines: list[str] = found.get("machines", [])

    def add(self, job: Job, record: Mapping[str, Any]) -> None:
        """Keeps a finished run, with the number of the machine that it ran on."""
        here = ", ".join([machine(), *(f"{name} {version(name)}" for name in PACKAGES)])
        if here not in self.machines:
            self.machines.append(here)
        self.runs[job.key] = {"choice": job.choice, **record, "machine": self.machines.index(here)}

    def save(self, plan: Plan) -> None:
        """Writes the file, whole or not at all."""
        top = {
            "command": COMMAND, "plan": asdict(plan), "machines": self.machines, "common": COMMON,
            "guidance": {name: each.flags for name, each in GUIDANCE.items()},
            "methods": {name: each.flags for name, each in METHODS.items()},
            "subjects": {name: asdict(each) for name, each in TEACHERS.items()},
            "teachers": self.teachers, "summary": summary(plan, self.runs),
        }  # fmt: skip
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in top.items()]
        runs = ",\n".join(f"  {json.dumps(key)}: {json.dumps(self.runs[key])}" for key in sorted(self.runs))
        write_whole(self.path, "{\n" + ",\n".join(lines) + ',\n"runs": {\n' + runs + "\n}}\n")


def summary(plan: Plan, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By teacher, guidance, steps and method: the choice, the seeds that stand, means, costs and paired changes."""
    found: dict[str, Any] = {}
    for teacher in TEACHERS:
        for guidance in GUIDANCE:
            for steps in STEPS:
                cell = cell_summary(plan, runs, teacher, guidance, steps)
                if cell:
                    found.setdefault(teacher, {}).setdefault(guidance, {})[str(steps)] = cell
    return found


def cell_summary(
    plan: Plan, runs: Mapping[str, Mapping[str, Any]], teacher: str, guidance: str, steps: int
) -> dict[str, Any]:
    """The methods that have a finished run on one teacher, with one guidance, for one number of steps."""
    found = {method: finals(plan, runs, teacher, guidance, steps, method) for method in METHODS}
    return {
        method: {
            "choice": choice,
            **of_method(by_seed),
            **{
                f"against_{other}": against(by_seed, found[other][1])
                for other in dict.fromkeys((BASELINE, METHODS[method].corrected))
                if other and other != method and shared(by_seed, found[other][1])
            },
        }
        for method, (choice, by_seed) in found.items()
        if by_seed
    }


def finals(
    plan: Plan, runs: Mapping[str, Mapping[str, Any]], teacher: str, guidance: str, steps: int, method: str
) -> tuple[Flags | None, dict[int, Mapping[str, Any]]]:
    """The search's choice, and the finished runs that have it, by seed."""
    choice = best_choice(search_jobs(plan, teacher, guidance, steps, method), runs)
    if choice is None:
        return None, {}
    keys = {seed: final_job(plan, teacher, guidance, steps, method, seed, choice).key for seed in range(SEEDS)}
    return choice, {seed: runs[key] for seed, key in keys.items() if key in runs}


def of_method(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds that stayed finite, and the costs."""
    finite = {seed: run for seed, run in by_seed.items() if run["finite"]}
    entry: dict[str, Any] = {"seeds": sorted(finite), "diverged": sorted(set(by_seed) - set(finite))}
    if finite:
        each = list(finite.values())
        entry |= means_of([run["final"] for run in each])
        entry["updates"] = mean(run["updates"] for run in each)
        entry["network_calls"] = mean(sum(run["network_calls"].values()) for run in each)
        entry["preparation"] = each[0]["preparation"]
    return entry


def shared(by_seed: Mapping[int, Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """The seeds that both have finite runs of."""
    return [seed for seed in by_seed if seed in others and by_seed[seed]["finite"] and others[seed]["finite"]]


def against(by_seed: Mapping[int, Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The paired change of the distance against another method's runs."""
    seeds = shared(by_seed, others)
    values, baseline = ([runs[seed]["final"][METRIC] for seed in seeds] for runs in (by_seed, others))
    return {**paired_change(values, baseline), "seeds": len(seeds)}
