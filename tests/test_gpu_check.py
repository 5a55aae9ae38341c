"""`benchmarks/gpu_check.py`, shrunken on the processor, so that the first card finds no typing error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu_check
import gpu_steps
from gpu_steps import TEACHERS, flags_of

from rdm_diffusers.config.command_line import parse_args


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the teachers that several steps share."""
    return tmp_path_factory.mktemp("gpu_check")


@pytest.mark.parametrize("name", TEACHERS)
def test_each_teachers_step_is_measured_beside_its_bare_calls(
    name: str, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    monkeypatch.setattr(gpu_steps, "REPEATS", 1)
    *_, found = gpu_steps.measure(name, scratch, small=True)
    assert found["update_seconds"] > 0 and found["bare_calls_seconds"] > 0 and found["peak_gib"] > 0
    assert found.get("float32_share_of_operations", 0) == 0 or "reward" in found["flags"]


def test_steps_are_processes_whose_results_are_written_with_the_planned_peak(
    monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    steps = ["tests", "flux_nf4"]
    argv = ["gpu_check.py", "--output", str(scratch), "--small", "--device", "cpu", "--steps", *steps]
    monkeypatch.setattr(sys, "argv", argv)
    gpu_check.main()
    found = json.loads((scratch / "gpu_check.json").read_text())["steps"]
    assert list(found) == steps and not any("failed" in each for each in found.values())
    assert "skipped" in found["tests"]["summary"] and found["tests"]["failures"] == []
    assert found["flux_nf4"]["planned_gib"] > 0 and found["flux_nf4"]["update_over_bare_calls"] > 0


def test_every_step_has_a_time_limit_and_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path), "--small"])
    args = gpu_check.parse()
    assert args.steps == list(gpu_check.LIMITS) and set(TEACHERS) < set(args.steps)
    for name in gpu_check.MAIN:
        assert parse_args(gpu_check.command(args, name)[2:], student="lora").optimisation.max_train_steps == 2
    for name in args.steps:
        assert gpu_check.LIMITS[name] > 0 and gpu_check.command(args, name)[0] == sys.executable
    assert all(flags_of(name, small=True)["base_quantization"] is None for name in TEACHERS)


def test_what_a_step_printed_last_is_what_it_found(tmp_path: Path) -> None:
    said = "a warning\n" + "".join(json.dumps({"flags": {}, "peak_gib": peak}) + "\n" for peak in (1, 2)) + "killed"
    assert gpu_check.result(tmp_path, "sdxl", said)["peak_gib"] == 2
    assert gpu_check.result(tmp_path, "sdxl", "nothing") == {}
    failures = gpu_check.result(tmp_path, "tests", "FAILED tests/gpu/a.py::b\n1 failed, 2 passed in 3.00s")
    assert failures == {"summary": "1 failed, 2 passed in 3.00s", "failures": ["FAILED tests/gpu/a.py::b"]}
