"""The method on one page, `docs/nano_rdm.py`: it runs, it improves the student, and it needs nothing but torch."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "nano_rdm.py"


@pytest.fixture(scope="module")
def nano() -> ModuleType:
    """The page, as a module."""
    specification = importlib.util.spec_from_file_location("nano_rdm", PAGE)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(nano: ModuleType) -> dict[str, tuple[float, float]]:
    """What a shorter run returns: each method's distance to the teacher and mean height."""
    return nano.main(updates=600, pretraining=1000)


def test_the_page_is_under_150_lines_and_imports_nothing_but_torch_and_the_standard_library() -> None:
    imports = [node for node in ast.walk(ast.parse(PAGE.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}
    assert len(PAGE.read_text().splitlines()) < 150


@pytest.mark.parametrize("method", ["DMD", "GNDM", "GNDMR"])
def test_every_method_brings_the_student_nearer_to_the_teacher(results: dict, method: str) -> None:
    assert results[method][0] < 0.85 * results["undistilled"][0]


def test_gndm_takes_a_third_off_the_distance_and_is_no_farther_than_dmd(results: dict) -> None:
    assert results["GNDM"][0] < 0.67 * results["undistilled"][0]
    assert results["GNDM"][0] < 1.1 * results["DMD"][0]


def test_gndmr_earns_more_reward_than_gndm(results: dict) -> None:
    assert results["GNDMR"][1] > results["GNDM"][1] + 0.03


def test_the_teacher_is_the_posterior_mean_by_tweedies_formula(nano: ModuleType) -> None:
    torch.manual_seed(0)
    t, prompt = 0.1 + 0.8 * torch.rand(100), torch.randint(nano.PROMPTS, (100,))
    x_t = torch.randn(100, 2, requires_grad=True)
    alpha, sigma = nano.scales(t)
    squared = (x_t[:, None] - alpha[:, None] * nano.MEANS[prompt]).square().sum(2)
    log_density = (-squared / (2 * (alpha**2 * nano.WIDTH**2 + sigma**2))).logsumexp(1)
    score = torch.autograd.grad(log_density.sum(), x_t)[0]
    tweedie = (x_t + sigma**2 * score) / alpha
    assert torch.allclose(nano.teacher(x_t, t, prompt), tweedie, atol=1e-4)


def test_a_group_of_one_has_no_bias_to_show_and_a_shared_error_shows_in_full(nano: ModuleType) -> None:
    sigma = torch.rand(8, 1) + 0.1
    error = sigma**2 * torch.tensor([[0.3, -0.2]])
    assert torch.equal(nano.fake_score_bias(error, sigma, 1), torch.zeros(8, 2))
    assert torch.allclose(nano.fake_score_bias(error, sigma, 4), error)
