"""Frozen networks in 8 or 4 bits: smaller, close to what they were, and trained on like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from parts import PROMPTS, make_run, relative_error, run_arguments, train_run
from peft.tuners.lora import LoraLayer
from torch import nn

import train_rdm_full
import train_rdm_lora
from rdm_diffusers.families import QUANTIZATIONS, load_denoiser, quantization
from rdm_diffusers.networks import FAKE_SCORE, STUDENT, TEACHER
from rdm_diffusers.pipelines import RdmDistillationPipeline

every = pytest.mark.parametrize("kind", QUANTIZATIONS)


@pytest.fixture(autouse=True)
def nf4_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes computes nf4 on processors, too, but diffusers asks for a GPU, and one kernel has no gradients."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *args, **kwargs: None)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.setattr(quantization, "NEEDS_GPU", ())


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes a command line in bfloat16."""
    return lambda **changes: run_arguments(
        teacher_folder, prompts_file, tmp_path / "student", **{"mixed_precision": "bf16", **changes}
    )


@every
def test_a_quantised_network_is_close_to_what_it_was(kind: str, teacher_folder: Path) -> None:
    exact, quantised = (load_denoiser(str(teacher_folder), torch.float32, quantization=q) for q in (None, kind))
    call = (torch.randn(4, 4, 8, 8), torch.tensor([20, 300, 600, 990]), torch.randn(4, 5, 16))
    with torch.no_grad():
        error = relative_error(*(unet(*call, return_dict=False)[0] for unet in (quantised, exact)))
    assert 1e-4 < error < {"int8": 0.02, "fp8": 0.05, "nf4": 0.2}[kind]


@every
def test_gradients_flow_through_a_quantised_base_to_what_it_denoises(kind: str, argv) -> None:
    it = make_run(argv(base_quantization=kind, algorithm="sid"))
    x_t = torch.randn(2, *it.distillation.latent_shape)
    given = (x_t, torch.tensor([300, 800]), it.distillation.prompts.once([0, 1]), torch.ones_like(x_t))
    for role in (TEACHER, FAKE_SCORE):
        gradient = it.networks.pull_back(role, *given)
        assert gradient.isfinite().all() and gradient.abs().flatten(1).mean(1).min() > 1e-3
    assert train_run(it) == 0


@every
def test_loras_on_a_quantised_base_are_float32_and_move_and_the_base_stays(kind: str, argv) -> None:
    it = make_run(argv(base_quantization=kind))
    layers = [
        m
        for m in it.networks.denoiser.modules()
        if isinstance(m, LoraLayer) and isinstance(m.get_base_layer(), nn.Linear)
    ]
    before = [m.get_base_layer()(torch.ones(1, m.in_features, dtype=torch.bfloat16)).detach().clone() for m in layers]
    adapters = it.networks.parameters(STUDENT) + it.networks.parameters(FAKE_SCORE)
    old = [parameter.detach().clone() for parameter in adapters]
    assert train_run(it) == 0
    assert all(parameter.dtype == torch.float32 for parameter in adapters)
    assert any(not torch.equal(now, then) for now, then in zip(adapters, old, strict=True))
    after = [m.get_base_layer()(torch.ones(1, m.in_features, dtype=torch.bfloat16)) for m in layers]
    assert all(torch.equal(now, then) for now, then in zip(after, before, strict=True))
    assert len(layers) > 10


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_student_of_a_quantised_base_loads_on_the_plain_one(kind: str, argv, tmp_path: Path) -> None:
    train_rdm_lora.main(argv(base_quantization=kind))
    student = RdmDistillationPipeline.from_pretrained(tmp_path / "student")
    student.set_progress_bar_config(disable=True)
    assert student(PROMPTS[0], output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_full_weights_are_trained_against_a_quantised_teacher(kind: str, argv, tmp_path: Path) -> None:
    it = make_run(argv(teacher_quantization=kind, rank=None), student="full")
    teacher, student = it.networks.denoisers[TEACHER], it.networks.denoisers[STUDENT]
    assert teacher.hf_quantizer is not None
    assert getattr(student, "hf_quantizer", None) is None
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    train_rdm_full.main(argv(teacher_quantization=kind, rank=None))
    loaded = RdmDistillationPipeline.from_pretrained(tmp_path / "student")
    assert "quantization_config" not in loaded.unet.config
    assert loaded.unet.dtype == torch.float32


def test_nf4_without_a_gpu_is_refused_in_one_sentence(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Weights in nf4 need a GPU; choose int8 or fp8"):
        load_denoiser(str(teacher_folder), torch.float32, quantization="nf4")


def test_a_package_that_is_missing_is_named(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"Weights in int8 need torchao: pip install 'rdm-diffusers\[quantization\]'"):
        load_denoiser(str(teacher_folder), torch.float32, quantization="int8")


def test_a_quantised_base_is_not_folded(argv, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        make_run(argv(base_quantization="int8", fold_adapters=True))
    assert "--fold_adapters and --base_quantization exclude each other" in capsys.readouterr().err
