"""A student, loaded as a user would: its defaults, and its pictures against those of stock diffusers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from parts import PROMPTS, make_run, randomise_adapters, relative_error, run_arguments
from torch import Tensor

import train_rdm_lora
from rdm_diffusers import RdmDistillationPipeline, RdmScheduler, RdmStableDiffusionPipeline
from rdm_diffusers.hub import export_lora
from rdm_diffusers.networks import STUDENT

STEPS = 4
TOLERANCE = 1e-3  # of a picture in [0, 1]: what 8-bit files cannot show
TRAINED = dict(num_student_steps=STEPS, train_batch_size=8, learning_rate=5e-2)


@pytest.fixture(scope="module")
def student(teacher_folder: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA student after two updates."""
    folder = tmp_path_factory.mktemp("student")
    train_rdm_lora.main(run_arguments(teacher_folder, prompts_file, folder, **TRAINED))
    return folder


@pytest.fixture(scope="module")
def full_student(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same student, saved with full weights."""
    folder = tmp_path_factory.mktemp("full")
    RdmDistillationPipeline.from_pretrained(student).save_pretrained(folder)
    return folder


def draw(pipeline, prompts: tuple[str, ...] = PROMPTS[:3], first_seed: int = 0, **options) -> Tensor:
    """Pictures `[B, 3, 32, 32]` in [0, 1], each of its own seed."""
    generators = [torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(list(prompts), generator=generators, output_type="pt", **options).images


def test_a_deterministic_student_is_exported_with_ddim_and_draws_the_same_in_stock_diffusers(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    train_rdm_lora.main(run_arguments(teacher_folder, prompts_file, tmp_path, **TRAINED, eta=0))
    stock = StableDiffusionPipeline.from_pretrained(teacher_folder)
    stock.load_lora_weights(tmp_path)
    stock.scheduler = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert "DDIMScheduler" in (tmp_path / "README.md").read_text()
    assert difference(draw(RdmDistillationPipeline.from_pretrained(tmp_path)), draw_as_stock(stock)) < TOLERANCE


def draw_as_stock(pipeline: StableDiffusionPipeline, first_seed: int = 0) -> Tensor:
    """Pictures as a user of stock diffusers draws them."""
    assert type(pipeline) is StableDiffusionPipeline
    return draw(pipeline, first_seed=first_seed, num_inference_steps=STEPS, guidance_scale=0.0)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def calls_of(pipeline) -> list[int]:
    """A list that grows by the batch size at every call of the U-Net."""
    batches: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    return batches


def test_a_student_is_an_rdm_pipeline_and_a_stock_pipeline(student: Path) -> None:
    pipeline = RdmDistillationPipeline.from_pretrained(student)
    assert type(pipeline) is RdmStableDiffusionPipeline
    assert isinstance(pipeline, RdmDistillationPipeline)
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert isinstance(pipeline.scheduler, RdmScheduler)


def test_the_defaults_are_the_trained_steps_without_guidance(student: Path) -> None:
    pipeline = RdmDistillationPipeline.from_pretrained(student)
    batches = calls_of(pipeline)
    draw(pipeline, PROMPTS[:2])
    assert batches == [2] * STEPS
    assert pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_given_steps_and_guidance_override_the_defaults(student: Path) -> None:
    pipeline = RdmDistillationPipeline.from_pretrained(student)
    batches = calls_of(pipeline)
    draw(pipeline, PROMPTS[:2], num_inference_steps=2, guidance_scale=3.0)
    assert batches == [4, 4]


def test_the_calls_signature_is_that_of_the_stock_pipeline(student: Path) -> None:
    ours, stock = (inspect.signature(c.__call__) for c in (RdmStableDiffusionPipeline, StableDiffusionPipeline))
    assert list(ours.parameters) == list(stock.parameters)


def test_a_student_draws_what_stock_diffusers_draws_with_its_lora_and_scheduler(
    student: Path, teacher_folder: Path
) -> None:
    stock = StableDiffusionPipeline.from_pretrained(teacher_folder)
    without = draw_as_stock(stock)
    stock.load_lora_weights(student)
    stock.scheduler = LCMScheduler.from_pretrained(student, subfolder="scheduler")
    theirs, ours = draw_as_stock(stock), draw(RdmDistillationPipeline.from_pretrained(student))
    assert difference(ours, theirs) <= TOLERANCE
    assert difference(without, theirs) > 10 * TOLERANCE


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(student: Path) -> None:
    pipeline = RdmDistillationPipeline.from_pretrained(student)
    together, again = draw(pipeline), draw(pipeline)
    alone = draw(pipeline, PROMPTS[2:3], first_seed=2)
    assert torch.equal(together, again)
    assert difference(together[2:], alone) <= TOLERANCE
    assert difference(together, draw(pipeline, first_seed=7)) > 10 * TOLERANCE


@pytest.mark.parametrize("loader", [RdmDistillationPipeline, StableDiffusionPipeline, AutoPipelineForText2Image])
def test_a_full_student_draws_the_same_whoever_loads_it(student: Path, full_student: Path, loader) -> None:
    expected = draw(RdmDistillationPipeline.from_pretrained(student))
    pipeline = loader.from_pretrained(full_student)
    images = draw(pipeline) if loader is RdmDistillationPipeline else draw_as_stock(pipeline)
    assert difference(images, expected) <= TOLERANCE


def test_saving_a_full_student_leaves_the_pipeline_as_it_was(student: Path, tmp_path: Path) -> None:
    pipeline = RdmDistillationPipeline.from_pretrained(student)
    before = draw(pipeline)
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(draw(pipeline), before)
    assert pipeline.get_active_adapters() == ["default_0"]


def test_a_full_student_names_stock_classes_only(full_student: Path) -> None:
    index = json.loads((full_student / "model_index.json").read_text())
    libraries = {entry[0] for entry in index.values() if isinstance(entry, list)}
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert libraries <= {"diffusers", "transformers", None}
    assert json.loads((full_student / "rdm_config.json").read_text())["base_model_name_or_path"] is None


def test_exported_schedulers_hold_nothing_that_stock_diffusers_would_complain_of(
    student: Path, full_student: Path
) -> None:
    known = inspect.signature(LCMScheduler.__init__).parameters.keys()
    for folder in (student, full_student):
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert {name for name in config if not name.startswith("_")} <= known


@pytest.mark.parametrize("alpha", [2, 7])
def test_a_lora_reloads_exactly_also_where_alpha_is_not_the_rank(
    alpha: int, teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    it = make_run(run_arguments(teacher_folder, prompts_file, tmp_path, rank=2, lora_alpha=alpha))
    randomise_adapters(it.networks)
    export_lora(tmp_path, it.teacher, it.networks.student_weights(), it.distillation.scheduler)
    pipeline = RdmDistillationPipeline.from_pretrained(tmp_path)
    x_t, t, conditioning = (
        torch.randn(4, 4, 8, 8),
        torch.tensor([999, 700, 400, 20]),
        it.distillation.prompts.conditioning([0]),
    )
    with torch.no_grad():
        trained = it.networks.predict(STUDENT, x_t, t, conditioning)
        output = pipeline.unet(x_t, t, conditioning.tensors["prompt_embeds"]).sample
    reloaded = (
        x_t - it.distillation.networks.schedule.scales(t, x_t)[1] * output
    ) / it.distillation.networks.schedule.scales(t, x_t)[0]
    assert relative_error(reloaded, trained) < 1e-5


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_student_loads_in_another_dtype(student: Path, name: str) -> None:
    pipeline = RdmDistillationPipeline.from_pretrained(student, **{name: torch.bfloat16})
    assert pipeline.unet.dtype == torch.bfloat16
    assert draw(pipeline).isfinite().all()


def test_a_student_of_a_teacher_in_a_relative_folder_loads_from_anywhere(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(teacher_folder.parent)
    train_rdm_lora.main(run_arguments(f"./{teacher_folder.name}", prompts_file, tmp_path, max_train_steps=1))
    monkeypatch.chdir(tmp_path)
    assert draw(RdmDistillationPipeline.from_pretrained(tmp_path)).shape == (3, 3, 32, 32)


def test_a_student_of_the_embedded_teacher_finds_it_by_name(prompts_file: Path, tmp_path: Path) -> None:
    train_rdm_lora.main(run_arguments("tiny", prompts_file, tmp_path, max_train_steps=1, steps_per_rollout=1))
    assert json.loads((tmp_path / "rdm_config.json").read_text())["base_model_name_or_path"] == "tiny"
    assert draw(RdmDistillationPipeline.from_pretrained(tmp_path)).shape == (3, 3, 32, 32)
