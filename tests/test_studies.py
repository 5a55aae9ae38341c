"""The studies of `benchmarks/`: every run that they would start is accepted, whatever happens to defaults and flags."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rdm_diffusers.config.command_line import parse_args

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import guidance_study
import target_study
from method_study import flags_of
from runs import words_of
from study_comparisons import COMPARISONS, TEACHERS
from study_run import command_line


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
