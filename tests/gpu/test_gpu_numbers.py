"""On a CUDA card a run computes what it computes on the processor; skipped without one.

CUDA_VISIBLE_DEVICES=0 python -m pytest tests/gpu
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from parts import make_conditioning, make_run, make_shared, relative_error, run_arguments, train_run
from parts_families import CALLS, MAKERS, make_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from rdm_diffusers.distillation import Draws
from rdm_diffusers.families import FAMILIES
from rdm_diffusers.networks import FAKE_SCORE, ROLES, STUDENT
from rdm_diffusers.training.batches import collect
from rdm_diffusers.training.updates import fake_score_update, student_update

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
BF16 = 2**-8  # half a unit in the last place of a bfloat16, relative


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes a command line of this test."""
    return lambda **changes: run_arguments(teacher_folder, prompts_file, tmp_path / "student", **changes)


def trained(argv: list[str], student: str = "lora") -> list[torch.Tensor]:
    it = make_run(argv, student)
    assert train_run(it) == 0
    return [p.detach().cpu() for role in (STUDENT, FAKE_SCORE) for p in it.networks.parameters(role)]


def test_random_numbers_are_those_of_the_processor() -> None:
    here, there = (Draws(3, 4, device) for device in ("cpu", "cuda"))
    for draw in (lambda d: d.normal("noise", [0, 5], (4, 8, 8)), lambda d: d.uniform("tau", [0, 5])):
        assert draw(there).device.type == "cuda"
        assert torch.equal(draw(there).cpu(), draw(here))


def test_a_float32_update_is_that_of_the_processor(argv, monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_card = trained(argv(max_train_steps=1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the device for the whole process
    assert relative_error(on_the_card, trained(argv(max_train_steps=1))) < 1e-3
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", MAKERS)
def test_bf16_is_close_to_float32_in_every_family(name: str, prompts_file: Path, tmp_path: Path) -> None:
    make_pipeline(name).save_pretrained(tmp_path / "teacher")
    reading, has_lora = CALLS.get(name, {}), FAMILIES[name].has_lora
    flags = dict(resolution=reading.get("height"), max_sequence_length=reading.get("max_sequence_length"))
    student = "lora" if has_lora else "full"
    flags |= {} if has_lora else {"rank": None}
    found = {}
    for precision in ("no", "bf16"):
        output = tmp_path / precision
        it = make_run(
            run_arguments(tmp_path / "teacher", prompts_file, output, mixed_precision=precision, **flags), student
        )
        x_t = it.distillation.draws.normal("x_t", [0], it.distillation.latent_shape)
        t = torch.tensor([100.0, 400.0, 700.0, 950.0], device="cuda").to(
            torch.float32 if it.teacher.schedule.is_flow else torch.int64
        )
        conditioning = it.distillation.prompts.conditioning([0])
        with torch.no_grad():
            found[precision] = [it.networks.predict(role, x_t, t, conditioning) for role in ROLES]
        assert train_run(it) == 0
        for role in (STUDENT, FAKE_SCORE):
            assert all(p.dtype == torch.float32 and p.isfinite().all() for p in it.networks.parameters(role))
    for exact, rounded in zip(found["no"], found["bf16"], strict=True):
        assert relative_error(rounded, exact) < 16 * BF16


@pytest.mark.parametrize("kind", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION,
                                  SDPBackend.CUDNN_ATTENTION], ids=lambda kind: kind.name.lower())  # fmt: skip
def test_flux_has_a_finite_gradient_in_bf16_with_every_kind_of_attention(
    kind: SDPBackend, prompts_file: Path, tmp_path: Path
) -> None:
    make_pipeline("FluxPipeline").save_pretrained(tmp_path / "teacher")
    flags = dict(resolution=32, max_sequence_length=8, mixed_precision="bf16")
    with sdpa_kernel([kind, SDPBackend.MATH]):
        it = make_run(run_arguments(tmp_path / "teacher", prompts_file, tmp_path / "student", **flags))
        student_update(it.distillation, collect(it.distillation, 0), it.state.statistics)
    assert all(p.grad is None or p.grad.isfinite().all() for p in it.networks.parameters(STUDENT))


@pytest.mark.parametrize("role", [STUDENT, FAKE_SCORE])
def test_a_bf16_adapter_has_the_gradient_of_a_float32_one(role: str) -> None:
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        networks = make_shared(dtype=dtype)
        networks.place(lambda module: module.cuda())
        t, conditioning = torch.tensor([20, 300, 600, 990]).cuda(), make_conditioning(4, dtype=dtype).to("cuda", dtype)
        x_t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
        x0 = networks.predict(role, x_t, t, conditioning)
        networks.backward(role, x0, torch.ones_like(x0))
        gradients.append([p.grad for p in networks.parameters(role)])
        assert all(p.grad.dtype == torch.float32 for p in networks.parameters(role))
    assert relative_error(gradients[1], gradients[0]) < 16 * BF16


def test_the_passes_of_an_update_do_not_wait_for_the_card(argv) -> None:
    it = make_run(argv(train_batch_size=4, gradient_accumulation_steps=2, mixed_precision="bf16"))
    assert train_run(it) == 0  # what is made once has been made
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = collect(it.distillation, 2)
        student_update(it.distillation, batch, it.state.statistics)
        fake_score_update(it.distillation, batch, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_folded_and_unfolded_adapters_train_alike(argv) -> None:
    assert relative_error(trained(argv(fold_adapters=True)), trained(argv())) < 1e-3


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_compiled_blocks_compute_the_same_for_both_adapters(precision: str, argv) -> None:
    directions = []
    for compiled in (None, True):
        it = make_run(argv(torch_compile=compiled, mixed_precision=precision))
        batch = collect(it.distillation, 0)
        student_update(it.distillation, batch, it.state.statistics)
        directions.append([p.grad for p in it.networks.parameters(STUDENT) if p.grad is not None])
        assert train_run(it) == 0
    assert relative_error(directions[1], directions[0]) < (1e-3 if precision == "no" else 64 * BF16)


def test_the_moving_average_off_the_card_and_on_it_are_the_same(argv) -> None:
    averages = []
    for offload in (True, None):
        it = make_run(argv(offload=offload))
        assert train_run(it) == 0
        averages.append([shadow.cpu() for shadow in it.state.ema.shadow_params])
    assert relative_error(*averages) < 1e-6
