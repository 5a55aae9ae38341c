"""Students that are whole networks, of every family: trained, saved as stock folders, and called in every usual way."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from parts import PROMPTS, run_arguments
from parts_families import CALLS, MAKERS, make_pipeline
from torch import Tensor

import rdm_diffusers.pipelines
import train_rdm_full
from rdm_diffusers.families import FAMILIES, PromptOptions, Teacher, rebuilt
from rdm_diffusers.pipelines import RdmDistillationPipeline, StudentConfig
from rdm_diffusers.training.assembly import make_scheduler

every = pytest.mark.parametrize("name", MAKERS)
STEPS = 4


def make_teacher(name: str) -> Teacher:
    call = CALLS.get(name, {})
    options = PromptOptions(call.get("max_sequence_length"), call.get("height"), 3.5)
    return Teacher(make_pipeline(name), FAMILIES[name], name, options)


def make_student(teacher: Teacher, denoiser: torch.nn.Module) -> RdmDistillationPipeline:
    """A network as the full student of a teacher, as a user would have it."""
    family = teacher.family
    scheduler = make_scheduler(teacher, STEPS, eta=1.0)
    config = StudentConfig(
        base_model_name_or_path=None,
        pipeline_class=teacher.name,
        scheduler={key: value for key, value in scheduler.config.items() if not key.startswith("_")},
        num_inference_steps=STEPS,
        call_arguments={**family.unguided(teacher.pipeline, teacher.options), **teacher.call_options},
    )
    pipeline_class = getattr(rdm_diffusers.pipelines, f"Rdm{teacher.name}")
    pipeline = rebuilt(pipeline_class, teacher.pipeline, **{family.denoiser_name: denoiser})._as(config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=list(MAKERS))
def student(request: pytest.FixtureRequest) -> RdmDistillationPipeline:
    teacher = make_teacher(request.param)
    return make_student(teacher, teacher.denoiser)


def draw(pipeline, prompts: tuple[str, ...] = PROMPTS[:2], **options: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt=list(prompts), **{"generator": generators, "output_type": "pt", **options}).images


@every
def test_a_full_student_is_distilled_and_drawn_alike_by_anyone(name: str, prompts_file: Path, tmp_path: Path) -> None:
    teacher, reading = make_teacher(name), CALLS.get(name, {})
    teacher.pipeline.save_pretrained(tmp_path / "teacher")
    own = {"resolution": reading.get("height"), "max_sequence_length": reading.get("max_sequence_length")}
    options = dict(train_batch_size=4, num_student_steps=STEPS, guidance_scale=3.5, rank=None, **own)
    folder = tmp_path / "student"
    train_rdm_full.main(run_arguments(tmp_path / "teacher", prompts_file, folder, **options))
    student = RdmDistillationPipeline.from_pretrained(folder)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "StableDiffusion3Pipeline" else {}
    stock = getattr(diffusers, name).from_pretrained(folder, **absent)
    torch.manual_seed(3)
    ours = draw(student, generator=None)
    torch.manual_seed(3)
    theirs = draw(stock, generator=None, num_inference_steps=STEPS, **student.student.call_arguments)
    assert (ours - theirs).abs().max() < 1e-4
    assert (draw(student) - draw(make_student(teacher, teacher.denoiser))).abs().max() > 1e-6
    assert student.student.base_model_name_or_path is None
    assert_card_runs(folder)


def assert_card_runs(folder: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        *lines, call = snippet.strip().splitlines()
        names: dict = {}
        exec("\n".join([*lines, f"picture = {call}"]), names)
        assert names["picture"].size == (32, 32)
        assert "load_lora_weights" not in snippet


@every
def test_its_folder_is_a_stock_one(name: str, tmp_path: Path) -> None:
    teacher = make_teacher(name)
    student = make_student(teacher, teacher.denoiser)
    student.save_pretrained(tmp_path)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "StableDiffusion3Pipeline" else {}
    stock = getattr(diffusers, name).from_pretrained(tmp_path, **absent)
    assert type(stock) is getattr(diffusers, name)
    torch.manual_seed(3)
    ours = draw(student, generator=None)
    torch.manual_seed(3)
    theirs = draw(stock, generator=None, num_inference_steps=STEPS, **student.student.call_arguments)
    assert (ours - theirs).abs().max() < 1e-4


def test_a_tuple_is_returned_where_one_is_wanted(student: RdmDistillationPipeline) -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    pictures = student(prompt=list(PROMPTS[:2]), generator=generators, output_type="pt", return_dict=False)
    assert isinstance(pictures, tuple)
    assert torch.equal(pictures[0], draw(student))


def test_several_pictures_of_a_prompt(student: RdmDistillationPipeline) -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    pair = student(prompt=PROMPTS[0], num_images_per_prompt=2, generator=generators, output_type="pt").images
    assert pair.shape[0] == 2
    assert (pair - draw(student, (PROMPTS[0], PROMPTS[0]))).abs().max() < 1e-4


def test_one_generator_serves_a_whole_batch(student: RdmDistillationPipeline) -> None:
    one, same = (draw(student, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, same)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "PixArtSigmaPipeline"])  # whose stock has none
def test_a_callback_sees_every_step_and_may_change_the_latents(name: str) -> None:
    teacher = make_teacher(name)
    student = make_student(teacher, teacher.denoiser)
    seen = []

    def note(pipeline, step: int, t: Tensor, kwargs: dict) -> dict:
        seen.append(step)
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == STEPS - 1 else {}

    changed = draw(student, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["latents"])
    assert seen == list(range(STEPS))
    assert (changed[0] - changed[1]).abs().max() < 1e-5


def test_other_numbers_of_steps_are_drawn_too(student: RdmDistillationPipeline) -> None:
    for steps in (1, 2, 8):
        assert draw(student, num_inference_steps=steps).isfinite().all()


def test_it_draws_in_bfloat16(student: RdmDistillationPipeline) -> None:
    pictures = draw(student)
    student.to(torch.bfloat16)
    rough = draw(student).float()
    assert rough.isfinite().all()
    assert (rough - pictures).abs().mean() < 0.1


@every
def test_a_class_that_is_given_no_student_is_its_stock_pipeline(name: str, tmp_path: Path) -> None:
    stock, pipeline_class = make_pipeline(name), getattr(rdm_diffusers.pipelines, f"Rdm{name}")
    options = {"generator": None, "num_inference_steps": 2, **CALLS.get(name, {})}
    torch.manual_seed(3)
    expected = draw(stock, **options)
    rebuilt(pipeline_class, stock).save_pretrained(tmp_path / "saved")
    made = [rebuilt(pipeline_class, stock), pipeline_class.from_pipe(stock)]
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "StableDiffusion3Pipeline" else {}
    for pipeline in [*made, pipeline_class.from_pretrained(tmp_path / "saved", **absent)]:
        assert type(pipeline) is pipeline_class and pipeline.student is None
        torch.manual_seed(3)
        assert (draw(pipeline, **options) - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"has no rdm_config.json, so it is not a student of ours"):
        RdmDistillationPipeline.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("name", ["StableDiffusionXL", "StableDiffusion3", "Flux", "ZImage", "QwenImage"])
def test_a_picture_may_be_where_it_begins(name: str) -> None:
    teacher = make_teacher(f"{name}Pipeline")
    student = make_student(teacher, teacher.denoiser)
    pipeline = rebuilt(getattr(diffusers, f"{name}Img2ImgPipeline"), student)
    pipeline.set_progress_bar_config(disable=True)
    known = inspect.signature(pipeline.__call__).parameters
    options = {key: value for key, value in student.student.call_arguments.items() if key in known}
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def redraw(strength: float) -> Tensor:
        torch.manual_seed(4)  # stock flow pipelines of this kind hand no generator to the scheduler
        call = dict(image=picture, strength=strength, num_inference_steps=STEPS, output_type="pt", **options)
        return pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(1), **call).images

    half, whole = redraw(0.5), redraw(1.0)
    assert torch.equal(half, redraw(0.5))
    assert half.shape == picture.shape and (half - whole).abs().max() > 1e-3
