"""The studies of `benchmarks/`: their runs are accepted and cost what is planned; the page shows what they found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.distillation import Draws

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import guidance_study
import study_report
import target_study
from method_study import flags_of
from runs import RESULTS, words_of
from study_comparisons import COMPARISONS, TEACHERS
from study_run import calls_per_update, command_line, distil, mean_depth


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_run_of_the_method_study_is_accepted(name: str, tmp_path: Path) -> None:
    comparison = COMPARISONS[name]
    for teacher in comparison.teachers:
        for flags in (flags_of(teacher, each) for each in comparison.variants.values()):
            parse_args(command_line(teacher, 0, tmp_path, **flags))


@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_run_of_the_guidance_study_is_accepted(teacher: str, tmp_path: Path) -> None:
    for flags in guidance_study.variants(teacher).values():
        parse_args(command_line(teacher, 0, tmp_path, **flags))


@pytest.mark.parametrize("changes", target_study.VARIANTS.values(), ids=list(target_study.VARIANTS))
def test_every_target_of_the_target_study_is_accepted(changes: dict[str, Any]) -> None:
    config = parse_args(words_of({**target_study.BASE, **changes}))
    assert config.target.teacher_target == "samples" and config.method.guidance_scale == 4.0


def test_a_run_makes_the_network_calls_that_are_planned_and_records_its_importance_ratios(tmp_path: Path) -> None:
    flags: dict[str, Any] = dict(
        algorithm="gndm", num_student_steps=2, steps_per_rollout=2, train_batch_size=8, reuse_rollouts=2,
        importance_weighting="clipped",
    )  # fmt: skip
    planned = 2 * calls_per_update(parse_args(command_line("tiny", 0, tmp_path, **flags)))
    found = distil("tiny", 0, tmp_path / "run", planned, marks=1, num_images=240, flags=flags)
    (end,) = found["curve"]
    assert end["updates"] == 2 and end["network_calls"] == planned and end["rollouts"] == 4
    assert list(found["ratios"]) == [1] and 0 < found["ratios"][1]["effective_sample_size"] <= 1


def test_the_mean_depth_of_rollouts_is_the_average_over_what_runs_draw(tmp_path: Path) -> None:
    config = parse_args(command_line("tiny", 0, tmp_path, num_student_steps=8, steps_per_rollout=2))
    draws, groups = Draws(seed=0, group_size=4), 4
    deepest = [max(draws.subset("executed_steps", group, 2, 8)[-1] for group in range(first, first + groups)) + 1
               for first in range(0, 8000, groups)]  # fmt: skip
    assert mean(deepest) == pytest.approx(mean_depth(config), abs=0.05)


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_page_of_evidence_has_the_tables_of_the_results(name: str) -> None:
    record = json.loads((RESULTS / "method_study.json").read_text())["comparisons"]
    page = study_report.EVIDENCE.read_text()
    assert f"<!-- study: {name} -->" in page
    assert study_report.tables(name, record.get(name, {})) in page


def test_a_table_has_no_row_of_fewer_than_five_seeds() -> None:
    point = {"fd_to_teacher": 1.0, "prompt_accuracy": 1.0}
    rows = {f"of {n}": {"flags": {}, "seeds": list(range(n)), "not_finite": [], "mean": point,
                        "standard_error": dict.fromkeys(point, 0.0)} for n in (4, 5)}  # fmt: skip
    assert "of 5" in study_report.tables("a", {"tiny": rows}) and "of 4" not in study_report.tables("a", {"tiny": rows})
    assert study_report.tables("main", {"tiny": {"of 4": rows["of 4"]}}) == ""
