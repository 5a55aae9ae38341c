"""The planned peak of every recipe in `docs/recipes.md`: each command with each of its row's settings, as a dry run.

    python benchmarks/recipes.py                         # compares the page with a new plan of every recipe
    python benchmarks/recipes.py --write docs/recipes.md # writes the table's peaks, and results/recipes.json

Teachers are read from folders of their published configurations; nothing is downloaded. It takes about four minutes.
"""

from __future__ import annotations

import argparse
import atexit
import json
import re
import shlex
import shutil
import sys
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from parts_configs import write_configs

from rdm_diffusers.config import RunConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.training.memory_plan import plan_memory
from rdm_diffusers.training.memory_table import GIB, MemoryPlan

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipes.md"
RESULT = ROOT / "benchmarks" / "results" / "recipes.json"
RESERVE = 1.0  # GiB of a card that no run gets: the CUDA context, fragmentation, kernels' workspaces
SCRIPTS = {"train_rdm_lora.py": "lora", "train_rdm_full.py": "full"}
PACKAGES = ("torch", "diffusers", "transformers", "peft")


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
    """The page's commands by their headings, which are the table's rows."""
    blocks = re.findall(r"^### (.+?)\n.*?```bash\n(.+?)```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return {heading: command.replace("\\\n", " ") for heading, command in blocks}


def cells() -> list[Cell]:
    """The page's table, without the cells where nothing fits.

    Raises:
        ValueError: if a cell has neither a setting with a peak nor a dash.
    """
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    table = rows[next(i for i, row in enumerate(rows) if row[-1] == "80 GB") :]
    cards = [int(word.split()[0]) for word in table[0][1:]]
    filled = []
    for row in table[1:]:
        for card, text in zip(cards, row[1:], strict=True):
            match = re.fullmatch(r"`([A-Z0-9]+)` ([\d.]+)", text.strip())
            if match:
                filled.append(Cell(row[0], card, *match.groups()))
            elif text.strip() != "-":
                raise ValueError(f"{row[0]}, {card} GB: {text!r} is neither a setting with its peak nor a dash.")
    return filled


def recipes() -> list[tuple[str, str]]:
    """Each row with each of its settings, once."""
    return sorted({(cell.row, cell.setting) for cell in cells()})


def recipe(row: str, setting: str) -> str:
    """The command of a row with a setting, as a shell would run it."""
    return " ".join(re.sub(r"\$[A-Z0-9]+", settings()[setting], commands()[row]).split())


@cache
def folder(teacher: str) -> Path:
    """A teacher's configurations, in a folder that goes when the process ends."""
    scratch = tempfile.mkdtemp(prefix="rdm-recipes-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return write_configs(teacher, Path(scratch) / "teacher")


def arguments(command: str) -> RunConfig:
    """A recipe's arguments, checked; the teacher is a folder instead of its name on the Hub."""
    accelerate, launch, script, *words = shlex.split(command)
    if (accelerate, launch) != ("accelerate", "launch"):
        raise ValueError(f"{command!r} does not start with `accelerate launch`.")
    index = words.index("--pretrained_model") + 1
    words[index] = str(folder(words[index]))
    return parse_args(words, student=SCRIPTS[script])


def plan(row: str, setting: str) -> MemoryPlan:
    """The dry run of a recipe."""
    return plan_memory(arguments(recipe(row, setting)))


def planned() -> dict:
    """All recipes' peaks in GiB and parameters in millions, by row and setting, with the commands they are of."""
    record: dict = {"software": {name: metadata.version(name) for name in PACKAGES}, "recipes": {}}
    for row, setting in recipes():
        made = plan(row, setting)
        parameters = {name: round(count / 1e6, 3) for name, count in made.parameters.items()}
        entry = {"command": recipe(row, setting), "peak_gib": round(made.peak / GIB, 3), "parameters": parameters}
        record["recipes"].setdefault(row, {})[setting] = entry
        print(f"{row:<36}{setting:<8}{entry['peak_gib']:>8.1f}", flush=True)
    return record


def with_peaks(text: str, made: dict) -> str:
    """The page with its table's peaks replaced."""

    def replaced(line: str) -> str:
        row = made["recipes"].get(line.split(" | ")[0].strip("| "), {})
        return re.sub(r"`([A-Z0-9]+)` [\d.]+", lambda match: f"`{match[1]}` {row[match[1]]['peak_gib']:.1f}", line)

    lines = text.splitlines(keepends=True)
    return "".join(replaced(line) if line.startswith("| ") else line for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page whose table is replaced; the result is written, too")
    args = parser.parse_args()
    made = planned()
    if args.write:
        args.write.write_text(with_peaks(args.write.read_text(), made))
        command = f"python benchmarks/recipes.py --write {args.write}"
        RESULT.write_text(json.dumps({"command": command, **made}, indent=2) + "\n")
    elif with_peaks(PAGE.read_text(), made) != PAGE.read_text():
        sys.exit(f"{PAGE} has other peaks; write them with --write {PAGE}.")


if __name__ == "__main__":
    main()
