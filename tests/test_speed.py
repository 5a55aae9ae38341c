"""Compilation, kinds of attention and places in memory change how a run computes, and not what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.training_utils import EMAModel
from parts import make_run, make_unet, relative_error, run_arguments, train_run
from parts_families import make_pipeline
from parts_float64 import ROUNDING

from rdm_diffusers.config import MemoryConfig
from rdm_diffusers.families import FAMILIES, PromptOptions
from rdm_diffusers.networks import FAKE_SCORE, STUDENT
from rdm_diffusers.training.devices import prepare_denoiser
from rdm_diffusers.training.optimizers import update_average
from rdm_diffusers.training.validation import averaged_student

SD = FAMILIES["StableDiffusionPipeline"]


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes a command line of this test."""
    return lambda **changes: run_arguments(teacher_folder, prompts_file, tmp_path / "student", **changes)


@pytest.fixture
def torchs_attention_afterwards() -> Iterator[None]:
    """diffusers remembers the last backend for the whole process."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def trained(argv: list[str], student: str = "lora") -> list[torch.Tensor]:
    it = make_run(argv, student)
    assert train_run(it) == 0
    return [p.detach() for role in (STUDENT, FAKE_SCORE) for p in it.networks.parameters(role)]


@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_compiled_blocks_compute_the_same_for_both_adapters(argv, flags: dict) -> None:
    compiled = argv(torch_compile=True, torch_compile_backend="aot_eager", **flags)
    it = make_run(compiled)
    blocks = [m for m in it.networks.denoiser.modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert blocks and all(block._compiled_call_impl is not None for block in blocks)
    assert relative_error(trained(compiled), trained(argv(**flags))) < 1e-4


@pytest.mark.parametrize("student", ["lora", "full"])
@pytest.mark.usefixtures("float64")
def test_channels_last_changes_the_layout_of_frozen_convolutions_and_no_number(argv, student: str) -> None:
    rank = {"rank": None} if student == "full" else {}
    it = make_run(argv(channels_last=True, **rank), student)
    layouts = {(p.requires_grad, p.is_contiguous(memory_format=torch.channels_last)) for network in it.networks.modules
               for p in network.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[-1] > 1}  # fmt: skip
    assert layouts == {(True, False), (False, True)}
    assert relative_error(trained(argv(channels_last=True, **rank), student), trained(argv(**rank), student)) < 1e-6


def test_the_average_of_many_tensors_at_once_is_that_of_diffusers_to_the_bit() -> None:
    parameters = [torch.nn.Parameter(torch.randn(width, 7)) for width in (1, 5, 300)]
    ours, theirs = (EMAModel(parameters, decay=0.9) for _ in range(2))
    for _ in range(12):
        for parameter in parameters:
            parameter.data += torch.randn_like(parameter)
        update_average(ours, parameters)
        theirs.step(parameters)
    assert all(torch.equal(a, b) for a, b in zip(ours.shadow_params, theirs.shadow_params, strict=True))
    assert ours.optimization_step == theirs.optimization_step


def test_the_moving_average_off_the_device_and_on_it_are_the_same(argv) -> None:
    runs = [make_run(argv(offload=offload or None)) for offload in (True, False)]
    averages = []
    for it in runs:
        assert train_run(it) == 0
        averages.append(it.state.ema.shadow_params)
    assert all(torch.equal(a, b) for a, b in zip(*averages, strict=True))


@pytest.mark.parametrize("student", ["lora", "full"])
def test_a_run_needs_its_text_encoders_no_more_once_its_prompts_are_read(student: str, argv, tmp_path: Path) -> None:
    it = make_run(argv(monitor_images=1, **({} if student == "lora" else {"rank": None})), student)
    assert len(it.teacher.text_encoders) == (student == "full")  # whose files include them
    it.teacher.drop_text_encoders()
    assert it.teacher.text_encoders == []
    assert train_run(it, lambda update: None) == 0
    with averaged_student(it.distillation, it.state):
        it.networks.student_weights()
    del it.validate  # which `train_run` replaced
    it.validate()
    assert (tmp_path / "student" / "validation" / "step-2.png").exists()


@pytest.mark.usefixtures("torchs_attention_afterwards")
@pytest.mark.usefixtures("float64")
def test_an_attention_backend_is_used_by_a_transformer_that_heeds_it() -> None:
    pipeline, family = make_pipeline("FluxPipeline"), FAMILIES["FluxPipeline"]
    shape, transformer = family.latent_shape(pipeline, 32), pipeline.transformer
    conditioning = family.encode_prompts(pipeline, ["a", "b"], PromptOptions(8, 32, 3.5))
    call = (torch.randn(2, *shape), torch.tensor([300.0, 800.0]), conditioning)
    with torch.no_grad():
        plain = family.denoise(transformer, *call)
        prepare_denoiser(transformer, MemoryConfig(attention_backend="_native_math"), family)
        other = family.denoise(transformer, *call)
    chosen = {m.processor._attention_backend for m in transformer.modules() if hasattr(m, "processor")}
    assert chosen == {AttentionBackendName._NATIVE_MATH}
    assert relative_error(other, plain) < ROUNDING


@pytest.mark.usefixtures("torchs_attention_afterwards")
def test_a_network_that_does_not_heed_an_attention_backend_is_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match="UNet2DConditionModel does not heed --attention_backend _native_math"):
        prepare_denoiser(make_unet(), MemoryConfig(attention_backend="_native_math"), SD)


def test_an_unknown_attention_backend_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="--attention_backend nonsense does not work here: "):
        prepare_denoiser(make_unet(), MemoryConfig(attention_backend="nonsense"), SD)


def test_xformers_where_it_does_not_work_is_one_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"--enable_xformers_memory_efficient_attention does not work here .* leave it"
    ):
        prepare_denoiser(make_unet(), MemoryConfig(enable_xformers_memory_efficient_attention=True), SD)
