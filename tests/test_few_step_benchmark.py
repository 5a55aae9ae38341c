"""The few-step benchmark: every run is accepted and ends at its network calls; results are kept, paired and shown."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.evaluation.pictures import to_pil

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import few_step_benchmark as benchmark
import few_step_page as page
from few_step_methods import (
    GUIDANCE,
    METHODS,
    PICTURED_STEPS,
    STEPS,
    TEACHERS,
    Job,
    Plan,
    best_choice,
    final_job,
    grid,
    search_jobs,
)
from few_step_results import Results, summary
from pages import write_between

PLAN = Plan()
CELL = ("tiny", "off", 4)


def run(distance: float, finite: bool = True) -> dict[str, Any]:
    """A finished run, as the file of results has it."""
    final = {"fd_to_teacher": distance, "prompt_accuracy": 0.5}
    return {"finite": finite, "processor_seconds": 9.0, "updates": 100, "network_calls": {"student forward": 24_000},
            "preparation": {}, "final": final, "curve": [[12_000, 2 * distance], [24_000, distance]]}  # fmt: skip


def searched(results: Results, *methods: str) -> dict[str, dict[str, Any]]:
    """Adds a search in which the third choice is the best, and returns that of each method."""
    for method in methods:
        for i, job in enumerate(search_jobs(PLAN, *CELL, method)):
            results.add(job, run(5.0 if i == 2 else 9.0))
    return {method: grid(method, *CELL[:2])[2] for method in methods}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Two methods with a search; the baseline has three seeds, the other two of them."""
    found = Results(tmp_path / "results.json")
    choices = searched(found, "dmd", "gndm")
    for method, distances in {"dmd": (8.0, 10.0, 12.0), "gndm": (4.0, 5.0)}.items():
        for seed, distance in enumerate(distances):
            found.add(final_job(PLAN, *CELL, method, seed, choices[method]), run(distance))
    found.teachers["tiny"] = {"off": {str(PLAN.images): {"fd_to_teacher": 1.25}}}
    return found


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("method", METHODS)
def test_every_run_of_the_benchmark_is_accepted(method: str, guidance: str, tmp_path: Path) -> None:
    if guidance not in METHODS[method].guidance:
        return
    for teacher in TEACHERS:
        for job in search_jobs(PLAN, teacher, guidance, 4, method):
            for steps in STEPS:
                parse_args(replace(job, steps=steps).command_line(tmp_path))


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_every_method_gets_a_search_of_the_same_size(guidance: str) -> None:
    for teacher in TEACHERS:
        grids = [grid(method, teacher, guidance) for method in METHODS]
        assert {len(each) for each in grids} == {6}
        assert all(each.count(choice) == 1 for each in grids for choice in each)


def test_what_a_correction_is_put_on_is_a_method_of_the_table() -> None:
    assert {each.corrected for each in METHODS.values()} - {None} <= set(METHODS)


def test_a_search_chooses_the_least_distance_that_did_not_diverge(tmp_path: Path) -> None:
    results, jobs = Results(tmp_path / "results.json"), search_jobs(PLAN, *CELL, "dmd")
    for job, distance in zip(jobs, (7.0, 3.0, 5.0, 6.0, 8.0, 9.0), strict=True):
        assert best_choice(jobs, results.runs) is None
        results.add(job, run(distance, finite=distance != 3.0))
    assert best_choice(jobs, results.runs) == jobs[2].choice


def test_means_errors_and_paired_changes_are_those_of_the_runs(results: Results) -> None:
    cell = summary(PLAN, results.runs)["tiny"]["off"]["4"]
    assert cell["dmd"]["seeds"] == [0, 1, 2] and cell["gndm"]["seeds"] == [0, 1]
    assert cell["dmd"]["mean"]["fd_to_teacher"] == 10.0
    assert cell["dmd"]["standard_error"]["fd_to_teacher"] == pytest.approx(2 / math.sqrt(3))
    assert cell["gndm"]["choice"] == grid("gndm", "tiny", "off")[2]
    assert cell["gndm"]["against_dmd"]["change_100_ln"] == pytest.approx(-100 * math.log(2))
    assert cell["gndm"]["against_dmd"]["standard_error"] == pytest.approx(0.0)
    assert cell["gndm"]["against_dmd"]["seeds"] == 2
    assert "against_dmd" not in cell["dmd"]


def test_a_diverged_run_is_counted_and_left_out_of_the_mean(results: Results) -> None:
    choice = grid("gndm", *CELL[:2])[2]
    results.add(final_job(PLAN, *CELL, "gndm", 2, choice), run(0.0, finite=False) | {"final": {}, "curve": []})
    entry = summary(PLAN, results.runs)["tiny"]["off"]["4"]["gndm"]
    assert (entry["seeds"], entry["diverged"], entry["mean"]["fd_to_teacher"]) == ([0, 1], [2], 4.5)


def test_runs_of_another_budget_are_not_mixed(results: Results) -> None:
    assert summary(replace(PLAN, calls=48_000), results.runs) == {}


def arguments(results: Results, tmp_path: Path, *more: str) -> Namespace:
    """Of the benchmark, on one cell."""
    words = ["--work_dir", str(tmp_path), "--results", str(results.path), "--methods", "dmd", "gndm", "--steps", "4"]
    args = benchmark.build_parser().parse_args([*words, "--teachers", "tiny", "--guidance", "off", *more])
    args.plan = PLAN
    return args


def test_a_finished_run_is_not_run_again(results: Results, tmp_path: Path) -> None:
    results.save(PLAN)
    assert benchmark.benchmark(arguments(results, tmp_path, "--seeds", "2")) == []
    assert Results(results.path).runs == results.runs


def test_runs_that_are_forgotten_are_not_summarised(results: Results, tmp_path: Path) -> None:
    results.save(PLAN)
    benchmark.benchmark(arguments(results, tmp_path, "--forget", "^final/.*/gndm/", "--summarise"))
    kept = json.loads(results.path.read_text())
    assert len(kept["runs"]) == len(results.runs) - 2 and list(kept["summary"]["tiny"]["off"]["4"]) == ["dmd"]


def test_seeds_without_a_search_are_refused(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    with pytest.raises(SystemExit, match="The search for dmd on tiny is not finished"):
        benchmark.finals(arguments(results, tmp_path), PLAN, results)


def test_a_run_ends_at_the_update_that_reaches_its_network_calls(tmp_path: Path) -> None:
    choice = dict(learning_rate=1e-3, fake_updates_per_step=1)
    job = Job("final", "tiny", "off", 1, "dmd", 0, 600, 240, choice)
    record = benchmark.execute(job, tmp_path / "cache", tmp_path / "pictures")
    calls, batch = record["network_calls"], 32
    assert sum(calls.values()) == record["curve"][-1][0] and record["finite"]
    an_update = sum(calls.values()) // record["updates"]
    assert calls["student backward"] == batch * record["updates"]
    assert sum(calls.values()) - an_update < 600 <= sum(calls.values())
    assert [point[0] for point in record["curve"]] == [an_update, 2 * an_update, 3 * an_update]
    assert (tmp_path / "pictures" / "tiny-off-1-dmd.png").exists()


def test_the_page_shows_the_least_distance_in_bold_with_seeds_and_changes(results: Results) -> None:
    results.save(PLAN)
    shown = page.tables(json.loads(results.path.read_text()))
    assert "| dmd | 10.00 ± 1.15 | 3 |" in shown["results"] and "| gndm | **4.50 ± 0.50** | 2 |" in shown["results"]
    assert "| the teacher, 50 steps | 1.25 |  |" in shown["results"]
    assert "| gndm | -69 ± 0 |" in shown["results"] and "| gndm | -69 ± 0 |" in shown["correction"]
    assert "| final | 5 | 0.0 |" in shown["runs"]


def test_curves_and_pictures_are_drawn_of_what_stands(results: Results, tmp_path: Path) -> None:
    results.save(PLAN)
    record = json.loads(results.path.read_text())
    page.draw_calls(record, tmp_path / "calls.png")
    page.draw_steps(record, tmp_path / "steps.png")
    for steps in PICTURED_STEPS:
        to_pil(torch.full((3, 32, 128), 0.5)).save(tmp_path / f"tiny-off-{steps}-dmd.png")
    files = page.pictured("tiny", "off", tmp_path)
    page.draw_strips(files, tmp_path / "strips.png")
    assert list(files) == ["dmd"] and "benchmark_tiny_off.png" in page.tables(record, tmp_path)["results"]
    assert all((tmp_path / f"{name}.png").stat().st_size > 0 for name in ("calls", "steps", "strips"))


def test_the_page_is_that_of_its_results(tmp_path: Path) -> None:
    copy = tmp_path / "benchmark.md"
    copy.write_text(page.PAGE.read_text())
    write_between(copy, page.tables(json.loads(page.RESULT.read_text())))
    assert copy.read_text() == page.PAGE.read_text()
