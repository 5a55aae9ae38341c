"""Every cell of `docs/recipes.md` is a command that parses, and whose dry run says the peak that is written there.

`python tests/test_recipes.py` writes the peaks anew where they have changed.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this file is run by itself

from parts_configs import TEACHERS, write_configs

from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.training.memory_plan import GIB, MemoryPlan, plan_memory

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
RESERVE = 1.0  # GiB of a card that no run gets: the CUDA context, fragmentation, kernels' workspaces
SCRIPTS = {"train_rdm_lora.py": "lora", "train_rdm_full.py": "full"}


class Cell(NamedTuple):
    """One cell of the page's table: a run on a card, and the peak in GiB that is written there."""

    row: str
    card: int
    setting: str
    peak: str


def settings() -> dict[str, str]:
    """The page's settings by name, as a shell would expand them: `{"BATCH": "--train_batch_size 4", ...}`."""
    values: dict[str, str] = {}
    for name, value in re.findall(r'^([A-Z0-9]+)="(.*)"$', PAGE.read_text(), re.MULTILINE):
        values[name] = re.sub(r"\$([A-Z0-9]+)", lambda match: values[match[1]], value)
    return values


def commands() -> dict[str, str]:
    """The page's commands by the headings they stand under, which are the table's rows."""
    found = re.findall(r"^### (.+?)\n.*?```bash\n(.+?)```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return {heading: command.replace("\\\n", " ") for heading, command in found}


def cells() -> list[Cell]:
    """The page's table, but for the cells where nothing fits."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    table = rows[next(i for i, row in enumerate(rows) if row[-1] == "80 GB") :]
    cards = [int(word.split()[0]) for word in table[0][1:]]
    found = []
    for row in table[1:]:
        for card, text in zip(cards, row[1:], strict=True):
            match = re.fullmatch(r"`([A-Z0-9]+)` ([\d.]+)", text.strip())
            assert match or text.strip() == "-", f"{row[0]}, {card} GB: {text!r}"
            found += [Cell(row[0], card, *match.groups())] if match else []
    return found


@cache
def folder(teacher: str) -> Path:
    """A teacher's configurations, once for all tests."""
    return write_configs(teacher, Path(tempfile.mkdtemp(prefix="rdm-recipes-")) / "teacher")


@cache
def plan(row: str, setting: str) -> MemoryPlan:
    """The dry run of a row's command with a setting; the teacher is read from a folder instead of from the Hub."""
    command = re.sub(r"\$[A-Z0-9]+", settings()[setting], commands()[row])
    accelerate, launch, script, *words = shlex.split(command)
    assert (accelerate, launch) == ("accelerate", "launch")
    index = words.index("--pretrained_model") + 1
    words[index] = str(folder(words[index]))
    return plan_memory(parse_args(words, student=SCRIPTS[script]))


RUNS = sorted({(cell.row, cell.setting) for cell in cells()}) if PAGE.exists() else []


@pytest.mark.parametrize("row, setting", RUNS)
def test_a_recipe_needs_what_the_page_says_and_fits_its_cards(row: str, setting: str) -> None:
    peak = plan(row, setting).peak / GIB
    for cell in cells():
        if (cell.row, cell.setting) == (row, setting):
            assert cell.peak == f"{peak:.1f}"
            assert peak + RESERVE <= cell.card


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


@pytest.mark.parametrize("row", sorted({cell.row for cell in cells()}) if PAGE.exists() else [])
def test_the_teachers_have_as_many_parameters_as_is_known(row: str) -> None:
    known = {word: TEACHERS[word] for word in shlex.split(commands()[row]) if word in TEACHERS}
    ((_, _, denoiser, encoders),) = known.values()
    counts = plan(row, next(setting for name, setting in RUNS if name == row)).parameters
    found = {name: count for name, count in counts.items() if name in ("unet", "transformer")}
    assert sum(found.values()) / 1e9 == pytest.approx(denoiser, rel=0.01)
    assert sum(count for name, count in counts.items() if "encoder" in name) / 1e9 == pytest.approx(encoders, rel=0.01)


def test_sdxl_at_1024_pixels_with_a_group_of_four_and_rank_64_fits_12_and_in_one_batch_16() -> None:
    small, whole = (plan("Stable Diffusion XL", setting).peak / GIB for setting in ("LEAN", "CKPT"))
    assert small + RESERVE <= 12 and whole + RESERVE <= 16
    assert f"{small:.1f} GiB at micro-batches of 1, {whole:.1f} GiB" in " ".join(PAGE.read_text().split())


def test_flux_with_a_base_of_4_bits_needs_less_than_24_gib() -> None:
    peak = plan("FLUX.1-dev", "NF4").peak / GIB
    assert peak < 24
    assert f"{peak:.1f} GiB with its base in 4 bits" in " ".join(PAGE.read_text().split())


def with_peaks(line: str) -> str:
    """A row of the page's table with its peaks written anew."""
    row = line.split(" | ")[0].strip("| ")
    names = re.findall(r"`([A-Z0-9]+)` ", line)
    peaks = {name: f"{plan(row, name).peak / GIB:.1f}" for name in names}
    return re.sub(r"`([A-Z0-9]+)` [\d.]+", lambda match: f"`{match[1]}` {peaks[match[1]]}", line)


if __name__ == "__main__":
    lines = PAGE.read_text().splitlines(keepends=True)
    PAGE.write_text("".join(with_peaks(line) if line.startswith("| ") else line for line in lines))
