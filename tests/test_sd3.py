"""Stable Diffusion 3: its teachers, the stock scheduler of its students, and students as a user loads them."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from parts import PROMPTS, relative_error, run_arguments
from parts_sd3 import TEXT_DIMS, TOKENS, make_sd3_pipeline, make_shared, make_student, rdm_scheduler
from torch import Tensor

import train_rdm_lora
from rdm_diffusers.evaluation import FLOW_SOLVERS, save_samples, solvers_of, teacher_sampler
from rdm_diffusers.families import FAMILIES, PromptOptions, Teacher, load_teacher
from rdm_diffusers.hub import write_card
from rdm_diffusers.networks import STUDENT, TEACHER
from rdm_diffusers.pipelines import RdmDistillationPipeline, RdmStableDiffusion3Pipeline
from rdm_diffusers.schedulers import RdmScheduler
from rdm_diffusers.tiny import TINY_FLOW_NAME
from rdm_diffusers.tiny.captions import CAPTIONS, DRAWINGS, MAX_TOKENS
from rdm_diffusers.tiny.classifier import load_classifier
from rdm_diffusers.training.assembly import make_scheduler

FAMILY = FAMILIES["StableDiffusion3Pipeline"]
STEPS = 4
TOLERANCE = 1e-4  # of a picture in [0, 1]
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # stock diffusers wants to be told


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3 teacher without a third text encoder."""
    folder = tmp_path_factory.mktemp("sd3")
    make_sd3_pipeline(shift=3.0).save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(teacher_folder: Path) -> Teacher:
    return load_teacher(str(teacher_folder), torch.float32, options=PromptOptions(TOKENS))


@pytest.fixture(scope="module", params=[1, 0], ids=["stochastic", "deterministic"])
def student(request: pytest.FixtureRequest, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA student."""
    return make_student(teacher_folder, tmp_path_factory.mktemp("student"), STEPS, request.param)


def draw(pipeline, prompts: tuple[str, ...] = PROMPTS[:3], first_seed: int = 0, **options) -> Tensor:
    """Pictures `[B, 3, 32, 32]` in [0, 1], each of its own seed."""
    generators = [torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(list(prompts), generator=generators, output_type="pt", **options).images


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def stock_student(teacher_folder: Path, student: Path) -> StableDiffusion3Pipeline:
    """The student as a user of stock diffusers loads it."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(teacher_folder, **WITHOUT_T5)
    pipeline.load_lora_weights(student)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(student, subfolder="scheduler")
    assert type(pipeline) is StableDiffusion3Pipeline
    return pipeline


def draw_from_latents(pipeline, **options) -> Tensor:
    """Pictures of given noises; later noises come from the global generator, which every pipeline falls back on."""
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(6)
    return pipeline(list(PROMPTS[:3]), latents=latents, output_type="pt", **options).images


# --- teachers


def test_a_flow_teacher_is_loaded_as_one(teacher: Teacher) -> None:
    assert teacher.prediction_type == "flow_prediction"
    assert teacher.schedule.is_flow
    assert teacher.family.latent_shape(teacher.pipeline, None) == (4, 8, 8)
    assert teacher.family.latent_shape(teacher.pipeline, 24) == (4, 6, 6)
    with pytest.raises(
        ValueError,
        match="of 20 x 20 pixels, because each side must be a multiple of 8; the",
    ):
        teacher.family.latent_shape(teacher.pipeline, 20)


@pytest.mark.parametrize("third_encoder", [False, True])
def test_prompts_are_encoded_as_the_stock_pipeline_encodes_them(third_encoder: bool) -> None:
    pipeline, prompts = make_sd3_pipeline(third_encoder=third_encoder), list(PROMPTS[:2])
    teacher = Teacher(pipeline, FAMILY, "me/teacher", PromptOptions(TOKENS))
    tensors = teacher.encode_prompts(prompts).tensors
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, max_sequence_length=TOKENS)
    assert torch.equal(tensors["prompt_embeds"], embeds)
    assert torch.equal(tensors["pooled_prompt_embeds"], pooled)
    assert embeds.shape[1] == MAX_TOKENS + TOKENS and pooled.shape == (2, sum(TEXT_DIMS))
    default = teacher.family.encode_prompts(pipeline, prompts, PromptOptions()).tensors["prompt_embeds"]
    assert default.shape[1] == MAX_TOKENS + 256


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_guided_teacher_is_what_the_stock_pipeline_computes_in_one_step(
    teacher: Teacher, guidance_scale: float
) -> None:
    latents = torch.randn(3, 4, 8, 8)
    teacher.pipeline.scheduler = teacher.family.stock_scheduler(teacher.pipeline.scheduler, 1, eta=0)
    expected = teacher.pipeline(
        list(PROMPTS[:3]), latents=latents, num_inference_steps=1, guidance_scale=guidance_scale,
        max_sequence_length=TOKENS, output_type="latent",
    ).images  # fmt: skip
    conditioning = teacher.encode_prompts(PROMPTS[:3])
    networks = make_shared(teacher, guidance_scale)
    with torch.no_grad():
        x0 = networks.predict(TEACHER, latents, torch.full((3,), 1000.0), conditioning)
        adapted = networks.predict(STUDENT, latents, torch.full((3,), 1000.0), conditioning)
    assert relative_error(x0, expected) < 1e-5
    assert relative_error(adapted, expected) > 1e-2


def test_latents_are_decoded_as_by_the_stock_pipeline(teacher: Teacher) -> None:
    options = dict(num_inference_steps=1, max_sequence_length=TOKENS)
    pictures = draw(teacher.pipeline, **options)
    latents = teacher.pipeline(
        list(PROMPTS[:3]), generator=[torch.Generator().manual_seed(i) for i in range(3)], output_type="latent",
        **options,
    ).images  # fmt: skip
    assert difference(teacher.family.decode(teacher.pipeline, latents), pictures) < 1e-6


def test_every_kind_of_layer_that_carries_the_picture_has_a_lora(teacher: Teacher) -> None:
    adapted = {re.sub(r".*blocks\.\d+\.", "", name) for name in make_shared(teacher).layers}
    attention = {f"{a}.{name}" for a in ("attn", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")}
    added = {f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
    feed_forward = {f"{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")}
    assert adapted == attention | added | feed_forward


@pytest.mark.parametrize("solver", FLOW_SOLVERS)
def test_a_flow_teachers_solvers_agree_at_many_steps(teacher: Teacher, solver: str) -> None:
    assert solvers_of(teacher.pipeline) is FLOW_SOLVERS
    samplers = [
        teacher_sampler(teacher.pipeline, name, 60, 1.0, max_sequence_length=TOKENS) for name in ("euler", solver)
    ]
    (one, _), (other, _) = (sampler(PROMPTS[:2], range(2)) for sampler in samplers)
    assert difference(one, other) < 0.03


# --- the scheduler that stock diffusers samples students with


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("own", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}])
def test_the_stock_scheduler_lays_the_even_grid_whatever_the_teachers_does(
    steps: int, own: dict, tmp_path: Path
) -> None:
    stock = FAMILY.stock_scheduler(FlowMatchEulerDiscreteScheduler(**own), steps)
    stock.save_pretrained(tmp_path)
    reloaded = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    reloaded.set_timesteps(steps)
    even = [(steps - i) / steps for i in range(steps)]
    assert reloaded.sigmas.tolist() == pytest.approx([*even, 0], abs=1e-7)
    assert reloaded.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in even], abs=1e-4)
    assert reloaded.config.stochastic_sampling


@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_stock_sampling_with_it_is_the_students_own(teacher: Teacher, steps: int, eta: int) -> None:
    options = dict(num_inference_steps=steps, guidance_scale=0.0, max_sequence_length=TOKENS)
    teacher.pipeline.scheduler = FAMILY.stock_scheduler(teacher.pipeline.scheduler, steps, eta)
    expected = draw_from_latents(teacher.pipeline, **options)
    teacher.pipeline.scheduler = rdm_scheduler(steps, eta)
    assert difference(draw_from_latents(teacher.pipeline, **options), expected) < TOLERANCE


@pytest.mark.parametrize("own", [{"shift": 3.0}, {"use_dynamic_shifting": True}])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_trains_a_flow_student_on_the_even_grid(steps: int, own: dict) -> None:
    teacher = Teacher(make_sd3_pipeline(**own), FAMILY, "me/teacher")
    scheduler = make_scheduler(teacher, steps, eta=1.0)
    assert scheduler.config.prediction_type == "flow_prediction"
    assert scheduler.sigmas.tolist() == pytest.approx([*((steps - i) / steps for i in range(steps)), 0], abs=1e-6)


def test_a_run_distils_a_flow_teacher(teacher_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    train_rdm_lora.main(run_arguments(teacher_folder, prompts_file, tmp_path, train_batch_size=4))
    assert json.loads((tmp_path / "metrics.json").read_text())["student"]["nfe"] == 2
    assert draw(RdmDistillationPipeline.from_pretrained(tmp_path)).isfinite().all()


# --- students


def test_a_student_is_an_rdm_pipeline_and_a_stock_pipeline(student: Path) -> None:
    pipeline = RdmDistillationPipeline.from_pretrained(student)
    assert type(pipeline) is RdmStableDiffusion3Pipeline
    assert isinstance(pipeline, StableDiffusion3Pipeline)
    assert isinstance(pipeline.scheduler, RdmScheduler)
    ours, stock = (inspect.signature(c.__call__) for c in (type(pipeline), StableDiffusion3Pipeline))
    assert list(ours.parameters) == list(stock.parameters)


def test_the_defaults_are_the_trained_steps_and_tokens_without_guidance(student: Path) -> None:
    pipeline = RdmDistillationPipeline.from_pretrained(student)
    shapes: list[tuple] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["encoder_hidden_states"].shape[:2])), with_kwargs=True
    )
    draw(pipeline, PROMPTS[:2])
    assert shapes == [(2, MAX_TOKENS + TOKENS)] * STEPS
    shapes.clear()
    draw(pipeline, PROMPTS[:2], num_inference_steps=1, guidance_scale=3.0, max_sequence_length=7)
    assert shapes == [(4, MAX_TOKENS + 7)]


def test_a_student_draws_what_stock_diffusers_draws_with_its_lora_and_scheduler(
    student: Path, teacher_folder: Path
) -> None:
    options = dict(num_inference_steps=STEPS, guidance_scale=0.0, max_sequence_length=TOKENS)
    stock = stock_student(teacher_folder, student)
    theirs = draw_from_latents(stock, **options)
    assert difference(draw_from_latents(RdmDistillationPipeline.from_pretrained(student)), theirs) < TOLERANCE
    stock.unload_lora_weights()
    assert difference(draw_from_latents(stock, **options), theirs) > 10 * TOLERANCE


def test_a_student_reloads_as_it_was_trained(student: Path, teacher: Teacher) -> None:
    x_t, t, conditioning = (
        torch.randn(4, 4, 8, 8),
        torch.tensor([1000.0, 700, 400, 20]),
        teacher.encode_prompts(PROMPTS[:4]),
    )
    transformer = RdmDistillationPipeline.from_pretrained(student).transformer
    with torch.no_grad():
        output = teacher.family.denoise(transformer, x_t, t, conditioning)
        trained = make_shared(teacher).predict(STUDENT, x_t, t, conditioning)
    assert relative_error(x_t - (t / 1000)[:, None, None, None] * output, trained) < 1e-5


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(student: Path) -> None:
    pipeline = RdmDistillationPipeline.from_pretrained(student)
    together, again = draw(pipeline), draw(pipeline)
    assert torch.equal(together, again)
    assert difference(together[2:], draw(pipeline, PROMPTS[2:3], first_seed=2)) < TOLERANCE
    assert difference(together, draw(pipeline, first_seed=7)) > 10 * TOLERANCE
    one = [pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="pt").images for _ in range(2)]
    assert torch.equal(*one)


def test_the_scheduler_is_left_as_it_was_even_after_an_error(student: Path) -> None:
    pipeline = RdmDistillationPipeline.from_pretrained(student)
    with pytest.raises(ZeroDivisionError):
        draw(pipeline, callback_on_step_end=lambda *args: 1 / 0)
    assert "step" not in vars(pipeline.scheduler)


@pytest.mark.parametrize("loader", [RdmDistillationPipeline, StableDiffusion3Pipeline, AutoPipelineForText2Image])
def test_a_full_student_draws_the_same_whoever_loads_it(student: Path, loader, tmp_path: Path) -> None:
    lora = RdmDistillationPipeline.from_pretrained(student)
    lora.save_pretrained(tmp_path)
    own = loader is RdmDistillationPipeline
    pipeline = loader.from_pretrained(tmp_path, **({} if own else WITHOUT_T5))
    options = {} if own else dict(num_inference_steps=STEPS, guidance_scale=0.0, max_sequence_length=TOKENS)
    assert difference(draw_from_latents(pipeline, **options), draw_from_latents(lora)) < TOLERANCE
    arguments = json.loads((tmp_path / "rdm_config.json").read_text())["call_arguments"]
    assert arguments == {"guidance_scale": 0.0, "max_sequence_length": TOKENS}
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]


@pytest.fixture(scope="module")
def tiny_flow_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a student of the embedded teacher, with its card."""
    folder = make_student(TINY_FLOW_NAME, tmp_path_factory.mktemp("tiny_flow"), 2, 1)
    write_card(folder)
    return folder


def snippets(student: Path) -> list[list[str]]:
    """The lines of each piece of code of a student's card."""
    card = (student / "README.md").read_text()
    return [text.strip().splitlines() for text in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)]


def test_the_cards_code_runs(student: Path) -> None:
    write_card(student)
    ours, stock = snippets(student)
    assert f"max_sequence_length={TOKENS}" in stock[-1]
    for lines in (ours, stock):
        assert run_snippet(lines).size == (32, 32)


def test_the_code_of_an_embedded_teachers_student_runs(tiny_flow_student: Path) -> None:
    for lines in snippets(tiny_flow_student):
        assert run_snippet(lines).size == (32, 32)


def run_snippet(lines: list[str]):
    """The picture that the last line makes."""
    names: dict = {}
    exec("\n".join([*lines[:-1], f"image = {lines[-1]}"]), names)
    return names["image"]


def test_the_samples_show_flow_teacher_and_student(student: Path, teacher: Teacher, tmp_path: Path) -> None:
    pipeline = RdmDistillationPipeline.from_pretrained(student)
    for count in (3, 2):
        metrics = save_samples(tmp_path / "samples.png", teacher.pipeline, pipeline, 2.0, PROMPTS[:count])
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"0.png", "1.png"}
    assert {name: (m.nfe, m.sampler) for name, m in metrics.items()} == {
        "teacher": (100, "euler"), "teacher_few_step": (2 * STEPS, "euler-trailing"), "student": (STEPS, "rdm"),
    }  # fmt: skip


# --- the embedded one


def test_the_embedded_flow_teacher_draws_what_it_is_asked() -> None:
    teacher = load_teacher(TINY_FLOW_NAME, torch.float32)
    assert teacher.call_options == {"max_sequence_length": 1}
    images, _ = teacher_sampler(teacher.pipeline, "euler-trailing", 8, 2.0, **teacher.call_options)(
        CAPTIONS[::4], range(60)
    )
    assert load_classifier().correct(images, list(DRAWINGS[::4]))["all"].float().mean() > 0.95
