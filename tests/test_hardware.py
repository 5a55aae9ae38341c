"""A run can compute where there is no float64, as on Apple's GPUs: only one function makes float64 tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from parts import change, make_run, run_arguments, train_run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rdm_diffusers import hardware
from rdm_diffusers.hardware import to_float64, uses_cpu

SCALARS = (torch.ops.aten.scalar_tensor.default,)  # of a number beside a float64 tensor, where that is
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class WithoutFloat64(TorchDispatchMode):
    """Collects the operations that a device without float64 could not do.

    They are those that make a float64 tensor of others, except in `to_float64`, which does that on the CPU; and those
    that combine a float64 tensor, which is on the CPU then, with another floating-point tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)]
        doubles = [each.dtype == torch.float64 for each in given if each.is_floating_point()]
        makes = any(isinstance(each, Tensor) and each.dtype == torch.float64 for each in tree_leaves(result))
        if makes and not any(doubles) and func not in SCALARS:
            self.made += 1
            if not calls("to_float64"):
                self.found.append(f"{func} makes float64 of others")
        shaped = {each.dtype == torch.float64 for each in given if each.is_floating_point() and each.ndim}
        if len(shaped) == 2 and func not in COPIES:
            self.found.append(f"{func} combines float64 with others")
        return result


def calls(name: str) -> bool:
    """Whether a function of this name is running."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reuse_rollouts": 2, "importance_weighting": "clipped", "steps_per_rollout": 2},
        {"algorithm": "gndmr", "reward": ["tiny_bold", "tiny_prompt"], "mixed_precision": "bf16"},
    ],
    ids=["plain", "weighted", "rewards"],
)
def test_an_update_needs_no_float64_on_the_device(
    options: dict, teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    it = make_run(run_arguments(teacher_folder, prompts_file, tmp_path / "student", logging_steps=1, **options))
    change(it, "optimisation", max_train_steps=it.config.method.reuse_rollouts)
    it.accelerator.log = lambda numbers, step: None
    with WithoutFloat64() as mode:
        train_run(it)
    assert mode.found == []
    assert mode.made > 0


def test_the_watch_finds_what_such_a_device_cannot_do() -> None:
    single = torch.ones(2)
    with WithoutFloat64() as mode:
        double = single.double()
        double + single
        to_float64(single) * to_float64(single)
    assert [text.split(" ", 1)[1] for text in mode.found] == ["makes float64 of others", "combines float64 with others"]


def test_float64_is_the_tensors_own_but_for_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.rand(3)
    assert torch.equal(to_float64(tensor), tensor.double())
    monkeypatch.setattr(hardware, "NO_FLOAT64", ("meta",))
    with pytest.raises(NotImplementedError):  # it tries to move a tensor without data to the CPU
        to_float64(torch.empty(3, device="meta"))


@pytest.mark.parametrize(("mps", "processes", "cpu"), [(True, "1", False), (True, "2", True), (False, "1", True)])
def test_apples_gpu_serves_a_run_of_one_process(
    mps: bool, processes: str, cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert uses_cpu() == cpu
