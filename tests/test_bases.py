"""Bases that a student may be put on; what a student's pipeline is saved as; and diffusers' AutoPipelines."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from parts import PROMPTS
from parts_families import MAKERS, make_pipeline
from torch import Tensor

import rdm_diffusers.pipelines.saving
from rdm_diffusers import RdmDistillationPipeline, RdmScheduler, RdmStableDiffusionPipeline
from rdm_diffusers.families import FAMILIES, rebuilt
from rdm_diffusers.pipelines import CLASSES
from rdm_diffusers.pipelines.bases import check_noise_schedule
from rdm_diffusers.pipelines.student_config import StudentConfig
from rdm_diffusers.tiny import resolve_teacher

FLOW = dict(prediction_type="flow_prediction")


def draw(pipeline, **options) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="pt", **options).images


@pytest.fixture
def pipeline(tiny_student: Path) -> RdmDistillationPipeline:
    """A LoRA student of the tiny teacher, whose adapter does something."""
    pipeline = RdmDistillationPipeline.from_pretrained(tiny_student)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return pipeline


def with_scheduler(folder: Path, **changes) -> Path:
    """The student's teacher, with another scheduler."""
    base = StableDiffusionPipeline.from_pretrained(resolve_teacher("tiny"))
    base.scheduler = DDIMScheduler.from_config(base.scheduler.config, **changes)
    base.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"prediction_type": "v_prediction"},
            "of prediction type epsilon, and .* is of v_prediction; give a base",
        ),
        ({"prediction_type": "sample"}, "prediction type epsilon, and .* is of sample; give a base of epsilon"),
        ({"beta_end": 0.03}, "distilled with another noise schedule than that of .*; give a base with the teacher's"),
    ],
    ids=["v", "sample", "betas"],
)
def test_a_base_of_another_prediction_type_or_noise_schedule_is_refused(
    changes: dict, said: str, tiny_student: Path, tmp_path: Path
) -> None:
    base = with_scheduler(tmp_path, **changes)
    with pytest.raises(ValueError, match=said):
        RdmDistillationPipeline.from_lora(base, tiny_student)
    with pytest.raises(ValueError, match=said):
        RdmDistillationPipeline.from_pipe(StableDiffusionPipeline.from_pretrained(base), tiny_student)


def test_a_base_with_another_solver_of_the_same_schedule_is_taken(tiny_student: Path) -> None:
    base = StableDiffusionPipeline.from_pretrained(resolve_teacher("tiny"))
    base.scheduler = EulerDiscreteScheduler.from_config(base.scheduler.config)
    assert torch.equal(
        draw(RdmDistillationPipeline.from_pipe(base, tiny_student)),
        draw(RdmDistillationPipeline.from_pretrained(tiny_student)),
    )


def student_of(name: str, scheduler: RdmScheduler) -> StudentConfig:
    return StudentConfig("base", name, dict(scheduler.config), 4)


def test_flow_bases_of_whatever_shift_are_taken_and_those_of_another_range_of_times_are_not() -> None:
    student = student_of("FluxPipeline", RdmScheduler(**FLOW))
    check_noise_schedule(student, "base", FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))
    with pytest.raises(ValueError, match="with another noise schedule than that of base"):
        check_noise_schedule(student, "base", FlowMatchEulerDiscreteScheduler(num_train_timesteps=500))


def test_zero_terminal_snr_is_the_same_schedule_in_every_stock_scheduler() -> None:
    zero = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    student = student_of("StableDiffusionPipeline", RdmScheduler(beta_start=1e-4, beta_end=0.02, **zero))
    for stock in (DDIMScheduler, EulerDiscreteScheduler):
        check_noise_schedule(
            student, "base", stock(beta_start=1e-4, beta_end=0.02, beta_schedule="scaled_linear", **zero)
        )
    with pytest.raises(ValueError, match="with another noise schedule"):
        plain = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="scaled_linear", prediction_type="v_prediction")
        check_noise_schedule(student, "base", DDIMScheduler(**plain))


def saved(pipeline, folder: Path) -> dict:
    pipeline.save_pretrained(folder)
    return json.loads((folder / "model_index.json").read_text())


def test_disabled_adapters_are_not_fused_when_saving(pipeline, tmp_path: Path, caplog) -> None:
    pipeline.disable_lora()
    logging.getLogger("rdm_diffusers").propagate = True
    saved(pipeline, tmp_path)
    assert caplog.text.count("adapters of the UNet2DConditionModel are disabled, so it is saved without them") == 1
    teacher = StableDiffusionPipeline.from_pretrained(resolve_teacher("tiny")).unet.state_dict()
    unet = StableDiffusionPipeline.from_pretrained(tmp_path).unet.state_dict()
    assert unet.keys() == teacher.keys() and all(torch.equal(unet[name], teacher[name]) for name in unet)
    assert torch.allclose(draw(RdmDistillationPipeline.from_pretrained(tmp_path)), draw(pipeline), atol=1e-5)


@pytest.mark.parametrize("how", ["enabled", "enabled again", "half", "fused", "unfused"])
def test_what_is_saved_draws_what_the_pipeline_draws(how: str, pipeline, tmp_path: Path) -> None:
    (adapter,) = pipeline.get_active_adapters()
    if how == "enabled again":
        pipeline.disable_lora()
        pipeline.enable_lora()
    if how == "half":
        pipeline.set_adapters([adapter], [0.5])
    if "fused" in how:
        pipeline.fuse_lora()
    if how == "unfused":
        pipeline.unfuse_lora()
    expected = draw(pipeline)
    saved(pipeline, tmp_path)
    assert torch.allclose(draw(RdmDistillationPipeline.from_pretrained(tmp_path)), expected, atol=1e-4)
    assert torch.equal(draw(pipeline), expected)


def test_a_pipeline_without_a_student_is_saved_with_stock_parts_only(pipeline, tmp_path: Path) -> None:
    pipeline.student = pipeline.scheduler.student = None
    index = saved(pipeline, tmp_path)
    assert index["_class_name"] == "StableDiffusionPipeline" and index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert not (tmp_path / "rdm_config.json").exists()
    options = dict(num_inference_steps=2, guidance_scale=0.0)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is StableDiffusionPipeline
    assert torch.allclose(draw(stock, **options), draw(pipeline, **options), atol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_familys_pipeline_with_our_scheduler_saves_a_stock_scheduler_of_the_same_grid(
    name: str, eta: float, tmp_path: Path
) -> None:
    stock = make_pipeline(name)
    scheduler = RdmScheduler.from_config(stock.scheduler.config, eta=eta)
    pipeline = rebuilt(CLASSES[name], stock, scheduler=scheduler)
    kept = rdm_diffusers.pipelines.saving.stock_scheduler(pipeline.scheduler, FAMILIES[name])
    assert type(kept).__module__.startswith("diffusers.")
    sigmas = [1.0, 0.75, 0.5, 0.25]
    call = dict(sigmas=sigmas, mu=0.7) if scheduler.schedule.is_flow else dict(num_inference_steps=5)
    for each in (kept, scheduler):
        each.set_timesteps(**call)
    assert torch.allclose(kept.timesteps.float(), scheduler.timesteps.float(), atol=1e-2)


def test_the_automatic_pipeline_of_text_to_image_keeps_a_student(pipeline) -> None:
    again = AutoPipelineForText2Image.from_pipe(pipeline)
    assert type(again) is RdmStableDiffusionPipeline and again.student == pipeline.student
    assert torch.equal(draw(again), draw(pipeline))


@pytest.mark.parametrize(
    ("auto", "stock"),
    [
        (AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline),
        (AutoPipelineForInpainting, StableDiffusionInpaintPipeline),
    ],
    ids=["image to image", "inpainting"],
)
def test_the_automatic_pipelines_of_other_tasks_take_a_student(auto, stock, pipeline) -> None:
    other = auto.from_pipe(pipeline)
    assert type(other) is stock and other.unet is pipeline.unet and other.scheduler is pipeline.scheduler
    picture, mask = torch.rand(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
    options = {"mask_image": mask} if stock is StableDiffusionInpaintPipeline else {}
    call = dict(image=picture, strength=0.5, num_inference_steps=2, guidance_scale=0.0, **options)
    assert draw(other, **call).isfinite().all()
    assert type(AutoPipelineForText2Image.from_pipe(other)) is StableDiffusionPipeline


@pytest.mark.parametrize("name", MAKERS)
def test_every_familys_pipeline_is_taken_where_its_stock_one_is(name: str) -> None:
    stock = make_pipeline(name)
    ours = rebuilt(CLASSES[name], stock)
    assert type(AutoPipelineForText2Image.from_pipe(ours)) is CLASSES[name]
    for auto in (AutoPipelineForImage2Image, AutoPipelineForInpainting):
        try:
            expected = type(auto.from_pipe(stock))
        except ValueError:
            continue
        assert type(auto.from_pipe(ours)) is expected
