"""Every command of `docs/recipes.md` is accepted, and its cells hold what `benchmarks/recipes.py` planned.

That command plans all recipes anew in about four minutes; here four are, one of each kind of network and student.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import recipes
from parts_configs import TEACHERS
from recipes import GIB, PAGE, RESERVE, RESULT, cells, commands

RECORD = json.loads(RESULT.read_text())["recipes"]
PLANNED_AGAIN = [
    ("Stable Diffusion 1.5", "CKPT"),
    ("Stable Diffusion 3.5 medium", "MICRO"),
    ("FLUX.1-dev", "NF4"),
    ("PixArt-Sigma, all weights", "CKPT"),
]


def peak(row: str, setting: str) -> float:
    """GiB, as recorded."""
    return RECORD[row][setting]["peak_gib"]


def test_every_cell_holds_the_recorded_peak_of_the_pages_command_and_fits_its_card() -> None:
    assert {row: set(settings) for row, settings in RECORD.items()} == {
        row: {setting for name, setting in recipes.recipes() if name == row} for row in commands()
    }
    for cell in cells():
        assert RECORD[cell.row][cell.setting]["command"] == recipes.recipe(cell.row, cell.setting)
        assert cell.peak == f"{peak(cell.row, cell.setting):.1f}"
        assert peak(cell.row, cell.setting) + RESERVE <= cell.card


def test_every_command_is_accepted_with_every_setting_of_its_row() -> None:
    for row, setting in recipes.recipes():
        config = recipes.arguments(recipes.recipe(row, setting))
        assert config.optimisation.samples_per_update in (4, 16)


@pytest.mark.parametrize(("row", "setting"), PLANNED_AGAIN)
def test_a_new_plan_gives_the_recorded_peak_and_parameters(row: str, setting: str) -> None:
    plan = recipes.plan(row, setting)
    assert round(plan.peak / GIB, 3) == peak(row, setting)
    assert {name: round(count / 1e6, 3) for name, count in plan.parameters.items()} == RECORD[row][setting][
        "parameters"
    ]


def test_every_row_has_its_command_and_every_command_a_setting_of_its_row() -> None:
    rows = {cell.row: set() for cell in cells()}
    for cell in cells():
        rows[cell.row].add(cell.setting)
    assert set(commands()) == set(rows)
    for row, command in commands().items():
        used = re.findall(r"\$([A-Z0-9]+)", command)
        assert len(used) == 1 and used[0] in rows[row], row
    named = {word for command in commands().values() for word in shlex.split(command) if word in TEACHERS}
    assert named == set(TEACHERS)


@pytest.mark.parametrize("row", sorted(RECORD))
def test_the_teachers_have_as_many_parameters_as_is_published(row: str) -> None:
    ((_, _, denoiser, encoders),) = (TEACHERS[word] for word in shlex.split(commands()[row]) if word in TEACHERS)
    for entry in RECORD[row].values():
        counts = entry["parameters"]
        (own,) = (count for name, count in counts.items() if name in ("unet", "transformer"))
        assert own / 1e3 == pytest.approx(denoiser, rel=0.01)
        read = sum(count for name, count in counts.items() if "encoder" in name)
        assert read / 1e3 == pytest.approx(encoders, rel=0.01)


def test_sdxl_at_1024_pixels_with_a_group_of_four_and_rank_64_fits_12_and_in_one_batch_16() -> None:
    small, whole = (peak("Stable Diffusion XL", setting) for setting in ("LEAN", "CKPT"))
    assert small + RESERVE <= 12 and whole + RESERVE <= 16
    assert f"{small:.1f} GiB at micro-batches of 1, {whole:.1f} GiB" in " ".join(PAGE.read_text().split())


def test_flux_with_a_base_of_4_bits_needs_less_than_24_gib() -> None:
    assert peak("FLUX.1-dev", "NF4") < 24
    assert f"{peak('FLUX.1-dev', 'NF4'):.1f} GiB with its base in 4 bits" in " ".join(PAGE.read_text().split())
