"""In bf16 everything that is large is computed in bf16, while what is trained stays float32."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from parts import make_conditioning, make_shared, relative_error
from parts_families import MAKERS
from parts_sd3 import make_shared as make_adapted
from test_families import make_teacher
from torch import Tensor

from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.families import FAMILIES
from rdm_diffusers.networks import FAKE_SCORE, ROLES, STUDENT, TEACHER

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from flops import FlopsByDtype

loras = pytest.mark.parametrize("name", [name for name in MAKERS if FAMILIES[name].has_lora])


@loras
def test_adapters_on_a_bf16_base_compute_nothing_large_in_float32(name: str) -> None:
    teacher = make_teacher(name)
    teacher.denoiser.to(torch.bfloat16)
    conditioning = teacher.encode_prompts(["a", "b"]).to("cpu", torch.bfloat16)
    networks = make_adapted(teacher)
    x_t = torch.randn(2, *teacher.family.latent_shape(teacher.pipeline, teacher.options.resolution))
    t = torch.tensor([300.0, 800.0] if teacher.schedule.is_flow else [300, 800])
    found = {}
    for role in ROLES:
        with FlopsByDtype() as forward, torch.no_grad():
            networks.predict(role, x_t, t, conditioning)
        with FlopsByDtype() as both:
            x0 = networks.predict(role, x_t.requires_grad_(role == TEACHER), t, conditioning)
            networks.backward(role, x0, torch.ones_like(x0))
        found[role] = forward.counts, both.counts
    for role in (STUDENT, FAKE_SCORE):
        for counts, bare in zip(found[role], found[TEACHER], strict=True):
            assert counts[torch.bfloat16] > bare[torch.bfloat16] > 0
            assert counts[torch.float32] <= bare[torch.float32]
        trained = networks.parameters(role)
        assert all(p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32) for p in trained)
    if name != "SanaPipeline":  # whose linear attention diffusers computes in float32, whatever its weights
        assert not any(counts[torch.float32] for each in found.values() for counts in each)


def predicted(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The student's x0 and its gradient, on a base in a dtype."""
    networks = make_shared(dtype=dtype)
    x_t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x0 = networks.predict(STUDENT, x_t, torch.tensor([20, 300, 600, 990]), make_conditioning(4, dtype=dtype))
    networks.backward(STUDENT, x0, torch.ones_like(x0))
    return x0.detach(), [parameter.grad for parameter in networks.parameters(STUDENT)]


def test_a_bf16_base_gives_the_student_and_its_gradient_to_bf16s_rounding() -> None:
    (exact, exact_gradient), (rounded, rounded_gradient) = predicted(torch.float32), predicted(torch.bfloat16)
    unit = torch.finfo(torch.bfloat16).eps
    assert relative_error(rounded, exact) < 4 * unit
    assert relative_error(rounded_gradient, exact_gradient) < 16 * unit


def test_adapters_are_not_folded_into_a_base_that_would_round_them_away(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="--fold_adapters needs a float32 base"):
        make_shared(fold=True, dtype=torch.bfloat16)
    with pytest.raises(SystemExit):
        parse_args(["--mixed_precision", "bf16", "--fold_adapters"])
    assert "--fold_adapters and --mixed_precision bf16 exclude each other" in capsys.readouterr().err
    assert parse_args([]).fold_adapters
    assert not parse_args(["--mixed_precision", "bf16"]).fold_adapters


def test_the_operations_of_a_product_and_of_its_gradients_are_counted_by_dtype() -> None:
    a = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(3, 5, requires_grad=True)
    with FlopsByDtype() as operations:
        (a @ b.to(torch.bfloat16)).sum().backward()
        a.float() @ b
    assert operations.counts == {torch.bfloat16: 3 * 2 * 2 * 3 * 5, torch.float32: 2 * 2 * 3 * 5}
