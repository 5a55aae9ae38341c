"""Importing costs next to nothing, pulls in nothing optional, and goes downwards from room to room."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rdm_diffusers

PACKAGE = Path(rdm_diffusers.__file__).parent
OPTIONAL = (
    "bitsandbytes", "cleanfid", "gradio", "hpsv2", "mlxtend", "rapidocr_onnxruntime", "scipy", "sklearn", "tensorboard",
    "torch_fidelity", "torchmetrics", "wandb", "xformers",
)  # fmt: skip
FLOORS = (
    {
        "bounds",
        "folders",
        "frechet",
        "hardware",
        "prediction",
        "program",
        "prompts",
        "quiet",
        "rewards",
        "sizes",
        "tiny",
        "untrusted",
    },
    {"schedulers", "families", "sharding", "adapters"},
    {"networks", "distillation", "pipelines"},
    {"hub", "evaluation", "config", "report", "demo"},
    {"training"},
    {"commands"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    """The room in which a file lies."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports from, wherever in the file it does so."""
    package, rooms = ["rdm_diffusers", *path.relative_to(PACKAGE).parts[:-1]], set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("rdm_diffusers.")}
    return rooms & FLOOR_OF.keys()


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in FLOOR_OF)


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_quick_after_diffusers_and_imports_nothing_optional() -> None:
    printed = python(
        "import sys, time, diffusers\n"
        "before, started = set(sys.modules), time.perf_counter()\n"
        "import rdm_diffusers\n"
        "print(time.perf_counter() - started, *(set(sys.modules) - before))"
    )
    seconds, *modules = printed.split()
    assert float(seconds) < 0.1
    assert {name.split(".")[0] for name in modules} == {"rdm_diffusers"}


def test_loading_and_sampling_students_needs_nothing_optional_nor_training() -> None:
    printed = python("import sys\nfrom rdm_diffusers import RdmDistillationPipeline, RdmScheduler\nprint(*sys.modules)")
    modules = set(printed.split())
    not_ours = {"scipy", "sklearn", "bitsandbytes"}  # imported by transformers and peft wherever they are installed
    assert not (set(OPTIONAL) - not_ours) & modules
    assert not {name for name in modules if name.startswith(("rdm_diffusers.training", "rdm_diffusers.evaluation"))}


def test_the_package_hands_on_the_names_that_it_lists() -> None:
    assert set(rdm_diffusers.__all__) <= set(dir(rdm_diffusers))
    assert all(getattr(rdm_diffusers, name) is not None for name in rdm_diffusers.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'RdmNothing'"):
        _ = rdm_diffusers.RdmNothing


def test_every_file_lies_in_a_room_of_the_plan() -> None:
    every = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert every <= FLOOR_OF.keys()
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_no_room_above_it(path: Path) -> None:
    room = room_of(path)
    above = {other for other in imported_rooms(path) if FLOOR_OF[other] > FLOOR_OF[room]}
    assert not above, f"{room} imports {above}"


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(room_of(path), set()).update(imported_rooms(path) - {room_of(path)})
    assert set(TopologicalSorter(graph).static_order()) >= {"prediction", "training"}


INITS = [path for path in FILES if path.name == "__init__.py" and path.parent.name != "tiny"]


@pytest.mark.parametrize("path", INITS, ids=lambda path: path.parent.name)
def test_a_rooms_init_hands_names_on_and_does_nothing_else(path: Path) -> None:
    body = ast.parse(path.read_text()).body[1:]  # after the docstring
    assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign) for node in body)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    at_the_top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in at_the_top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in at_the_top if isinstance(node, ast.ImportFrom) and not node.level}
    assert not {name.split(".")[0] for name in names} & set(OPTIONAL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_has_over_300_lines_and_no_function_over_60(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert all((node.end_lineno or 0) - node.lineno < 60 for node in functions)


def test_a_namespace_stays_with_the_parsing() -> None:
    parsing = {"bounds.py", "command_line.py", "arguments.py", "secrecy.py"}
    found = {path.name for path in FILES if "Namespace" in path.read_text()}
    assert found <= parsing | {"make_teacher.py", "make_flow_teacher.py", "make_v_teacher.py"}
