"""A newcomer's first run says what is trained and where it goes, shows its bars and its numbers, and nothing else."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from parts import run_arguments

from rdm_diffusers.quiet import HARMLESS, is_heard

ROOT = Path(__file__).parents[1]
PROGRAMS = {"train_rdm_lora.py": 2, "train_rdm_full.py": None}  # with the rank


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_says_nothing_that_concerns_nobody(program: str, prompts_file: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    words = run_arguments("tiny", prompts_file, student, rank=PROGRAMS[program], num_eval_images=7, steps_per_rollout=2)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("RDM_VERBOSE", None)
    done = subprocess.run(
        [sys.executable, ROOT / program, *words], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    bars = [line for line in done.stderr.replace("\r", "\n").splitlines() if line]
    assert bars and all(line.startswith("distil: ") for line in bars)
    kind = "LoRA student" if program == "train_rdm_lora.py" else "student of full weights"
    said = [line for line in done.stdout.splitlines() if line]
    assert said[0] == f"Distilling tiny into a 2-step {kind} in {student}: GNDM, 2 updates of 8 samples."
    assert [line.split()[0] for line in said[1:5]] == ["nfe", "teacher", "teacher_few_step", "student"]
    assert said[5:] == [
        f"The student's card is {student / 'README.md'}. Load the student with:",
        f"RdmDistillationPipeline.from_pretrained({str(student)!r})",
    ]


@pytest.mark.parametrize(
    "line, heard",
    [
        *((f"`CLIPImageProcessor` {part} here", False) for part in HARMLESS),
        ("The following part of your input was truncated because CLIP can only handle 77 tokens", True),
        ("Some weights of the model checkpoint were not used", True),
    ],
)
def test_lines_about_the_users_model_and_prompts_are_heard(line: str, heard: bool) -> None:
    assert is_heard(logging.LogRecord("diffusers", logging.WARNING, "", 1, line, None, None)) == heard


def test_a_variable_lets_other_packages_say_all_they_want() -> None:
    code = (
        "import rdm_diffusers.quiet\n"
        "from diffusers.utils.logging import get_logger\n"
        "print(*(len(handler.filters) for handler in get_logger().handlers))"
    )
    counts = []
    for verbose in ("", "1"):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RDM_VERBOSE": verbose}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        counts.append(int(done.stdout))
    assert counts == [1, 0]


def said(*words: str, verbose: str = "") -> str:
    """What a Python program writes to stderr."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RDM_VERBOSE": verbose}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=True)
    return done.stderr


def test_the_evaluation_as_a_module_starts_as_quietly_as_the_command() -> None:
    assert said("-m", "rdm_diffusers.evaluation", "--help") == ""


def test_a_library_that_imports_the_evaluation_quietens_nobody() -> None:
    code = "import sys, rdm_diffusers.evaluation\nassert 'rdm_diffusers.quiet' not in sys.modules"
    said("-c", code, "-m", "rdm_diffusers.evaluation")


WARNS = (
    "import warnings, rdm_diffusers.quiet\n"
    "from rdm_diffusers.config import RunConfig\n"
    "from rdm_diffusers.program import run_program\n"
    "def main():\n"
    "    RunConfig.of(lr_scheduler='constant', lr_warmup_steps=5, report_to='none')\n"
    "    warnings.warn_explicit('of another package', UserWarning, '/site-packages/other/file.py', 7)\n"
)
SENTENCE = "--lr_warmup_steps has no effect with --lr_scheduler constant; use constant_with_warmup."


def test_a_warning_of_our_own_is_a_sentence_in_a_program_and_those_of_others_name_their_place() -> None:
    lines = said("-c", WARNS + "run_program(main)").splitlines()
    assert lines == [f"Warning: {SENTENCE}", "/site-packages/other/file.py:7: UserWarning: of another package"]


@pytest.mark.parametrize(("call", "verbose"), [("run_program(main)", "1"), ("main()", "")], ids=["verbose", "library"])
def test_a_warning_of_our_own_names_its_place_in_a_library_and_where_all_is_shown(call: str, verbose: str) -> None:
    assert re.search(rf"checks.py:\d+: UserWarning: {SENTENCE}", said("-c", WARNS + call, verbose=verbose))
