"""The notebook runs from top to bottom as it stands, but for how much it trains."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
FEW = "TARGET_IMAGES, TARGET_UPDATES, UPDATES, EVALUATED = 40, 1, 2, 48"


@pytest.fixture(scope="module")
def notebook() -> NotebookNode:
    """As it is in the repository."""
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, NotebookNode], Path]:
    """Its cells by their names after a short run in this environment, and the folder of that run."""
    folder = tmp_path_factory.mktemp("notebook")
    write_kernel_spec(folder / "kernels" / "python3")  # of this very Python
    short = nbformat.read(NOTEBOOK, as_version=4)
    (place,) = (i for i, cell in enumerate(short.cells) if "parameters" in cell.metadata.get("tags", []))
    short.cells.insert(place + 1, nbformat.v4.new_code_cell(FEW, id="injected-parameters"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        NotebookClient(short, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    return {cell.id: cell for cell in short.cells}, folder


def outputs(cell: NotebookNode) -> tuple[str, int]:
    """What a cell printed, and how many pictures it shows."""
    text = "".join(each.get("text", "") for each in cell.outputs)
    return text, sum("image/png" in each.get("data", {}) for each in cell.outputs)


def test_the_notebook_is_stored_without_outputs_and_is_valid(notebook: NotebookNode) -> None:
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert notebook.cells[0].cell_type == "markdown" and notebook.metadata.kernelspec.name == "python3"


def test_it_shows_the_teacher_the_training_and_the_student(done) -> None:
    cells, _ = done
    pictures = {"teacher-pictures": 1, "run": 2, "samples": 1, "student": 2, "stock-diffusers": 1, "bold": 2}
    assert {name: outputs(cells[name])[1] for name in pictures} == pictures
    assert "update 2: the fake score's loss is" in outputs(cells["run"])[0]


def test_it_leaves_a_student_with_its_card_and_a_rewarded_one_with_its_record(done) -> None:
    _, folder = done
    files = {path.name for path in (folder / "tiny-student").iterdir()}
    assert {"pytorch_lora_weights.safetensors", "README.md", "samples.png", "metrics.json"} <= files
    assert "python:boldness" in (folder / "bold-student" / "config.yaml").read_text()


def test_it_measures_teacher_and_student_and_the_reward_of_both_students(done) -> None:
    cells, _ = done
    table = outputs(cells["measure"])[0].splitlines()
    assert [line.split(",")[0] for line in table[1:]] == ["teacher", "student"]
    said = outputs(cells["bold"])[0]
    values = [float(line.rpartition(": ")[2]) for line in said.splitlines() if line.startswith("boldness")]
    assert len(values) == 2 and all(0 < value < 1 for value in values)


def test_nothing_is_installed_or_pushed_where_the_package_is_there(done) -> None:
    cells, _ = done
    assert not cells["pip"].outputs and not cells["hub"].outputs
