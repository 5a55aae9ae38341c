"""Every family: read, denoised, guided and decoded as its stock pipeline does, distilled, and sampled by anyone."""

from __future__ import annotations

import copy
import json
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from parts import PROMPTS, relative_error, run_arguments
from parts_families import CALLS, MAKERS, make_pipeline, own_latents, stock_latents
from parts_sd3 import make_shared
from torch import Tensor

import rdm_diffusers.pipelines
import train_rdm_lora
from rdm_diffusers.config import RunConfig
from rdm_diffusers.evaluation.subjects import stock_name, teacher_sampler
from rdm_diffusers.families import FAMILIES, Conditioning, PromptOptions, Teacher, load_teacher, on_white
from rdm_diffusers.networks import FAKE_SCORE, ROLES, STUDENT, TEACHER, Networks, SeparateNetworks
from rdm_diffusers.pipelines import RdmDistillationPipeline
from rdm_diffusers.schedulers.grids import shifted
from rdm_diffusers.training.assembly import teacher_shift

FILMS = ("QwenImagePipeline", "QwenImage21Pipeline", "Krea2Pipeline")
every = pytest.mark.parametrize("name", MAKERS)
loras = pytest.mark.parametrize("name", [name for name in MAKERS if FAMILIES[name].has_lora])


def options_of(name: str) -> PromptOptions:
    return PromptOptions(CALLS.get(name, {}).get("max_sequence_length"), CALLS.get(name, {}).get("height"), 3.5)


def make_teacher(name: str) -> Teacher:
    return Teacher(make_pipeline(name), FAMILIES[name], name, options_of(name))


def make_networks(teacher: Teacher, guidance_scale: float) -> Networks:
    """The roles, the student a little off the teacher; separate networks where the family has no LoRA."""
    if teacher.family.has_lora:
        return make_shared(teacher, guidance_scale)
    denoisers = {role: copy.deepcopy(teacher.denoiser) for role in ROLES}
    for parameter in denoisers[STUDENT].parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return SeparateNetworks(
        denoisers, family=teacher.family, schedule=teacher.schedule, prediction_type=teacher.prediction_type,
        null_conditioning=teacher.encode_nothing(), guidance_scale=guidance_scale,
    )  # fmt: skip


def draw(pipeline, prompts: tuple[str, ...] = PROMPTS[:3], first_seed: int = 0, **options: Any) -> Tensor:
    """Pictures in [0, 1], each of its own seed."""
    generators = [torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))]
    pipeline.set_progress_bar_config(disable=True)
    size = 1 if FAMILIES[stock_name(pipeline)].mixes_prompts else len(prompts)
    parts = [slice(i, i + size) for i in range(0, len(prompts), size)]
    calls = ({"prompt": list(prompts[part]), "generator": generators[part], **options} for part in parts)
    return torch.cat([pipeline(output_type="pt", **call).images for call in calls])


def test_every_family_has_its_pipeline_class() -> None:
    for name in FAMILIES:
        pipeline_class = getattr(rdm_diffusers.pipelines, f"Rdm{name}")
        assert issubclass(pipeline_class, RdmDistillationPipeline)
        assert issubclass(pipeline_class, getattr(diffusers, name))


@every
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_guided_teacher_is_what_the_stock_pipeline_computes_in_one_step(name: str, guidance_scale: float) -> None:
    teacher = make_teacher(name)
    latents = torch.randn(2, *teacher.family.latent_shape(teacher.pipeline, teacher.options.resolution))
    stock = make_pipeline(name)
    stock.scheduler = teacher.family.stock_scheduler(stock.scheduler, 1, eta=0)
    told = teacher.family.embeds_guidance(stock)
    guided = {"guidance_scale": 3.5} if told else teacher.family.guided(guidance_scale)
    size = 1 if teacher.family.mixes_prompts else 2
    if "negative_prompt" in guided:
        guided["negative_prompt"] = [guided["negative_prompt"]] * size
    call = {"num_inference_steps": 1, "output_type": "latent", **CALLS.get(name, {}), **guided}
    parts = [slice(i, i + size) for i in range(0, 2, size)]
    with torch.no_grad():
        rows = [
            stock(prompt=list(PROMPTS[part]), latents=stock_latents(name, latents[part]), **call).images
            for part in parts
        ]
    expected = torch.cat(rows)
    conditioning = teacher.encode_prompts(PROMPTS[:2])
    networks = make_networks(teacher, 1.0 if told else guidance_scale)
    first = torch.full((2,), 1000.0 if teacher.schedule.is_flow else 999)
    with torch.no_grad():
        x0, adapted = (networks.predict(role, latents, first, conditioning) for role in (TEACHER, STUDENT))
    expected = own_latents(stock, expected, latents)
    assert relative_error(x0, expected) < 1e-5
    assert relative_error(adapted, expected) > 1e-3


def noisy(teacher: Teacher) -> tuple[Tensor, Tensor, Conditioning]:
    """Three samples for `predict`, at three times, of prompts of three lengths."""
    shape = teacher.family.latent_shape(teacher.pipeline, teacher.options.resolution)
    latents = torch.randn(3, *shape, generator=torch.Generator().manual_seed(3))
    return latents, torch.tensor([200, 500, 900]), teacher.encode_prompts(["a", *PROMPTS[:2]])


@loras
def test_gradient_checkpointing_changes_neither_predictions_nor_gradients(name: str) -> None:
    found = []
    for checkpointing in (False, True):
        teacher = make_teacher(name)
        if checkpointing:
            teacher.family.checkpoint(teacher.denoiser)
        networks = make_shared(teacher)
        x0 = networks.predict(STUDENT, *noisy(teacher))
        networks.backward(STUDENT, x0, x0.detach())
        gradients = [p.grad.flatten() for p in networks.parameters(STUDENT) if p.grad is not None]
        found.append((x0.detach(), torch.cat(gradients)))
    for plain, recomputed in zip(*found, strict=True):
        assert relative_error(recomputed, plain) < 1e-5


@every
def test_a_discriminator_reads_the_features_of_a_fake_score(name: str) -> None:
    found = []
    for checkpointing in (False, True):
        teacher = make_teacher(name)
        if checkpointing:
            teacher.family.checkpoint(teacher.denoiser)
        networks, inputs = make_networks(teacher, 1.0), noisy(teacher)
        fake_score = networks.denoisers[FAKE_SCORE] if isinstance(networks, SeparateNetworks) else teacher.denoiser
        networks.add_discriminator(teacher.family.middle_block(fake_score), inputs[0][:1], inputs[1][:1])
        with torch.no_grad():
            networks.discriminator.whole[-1].weight += 1
        plain = networks.predict(FAKE_SCORE, *inputs).detach()
        x0, logit = networks.fake_score(*inputs)
        assert torch.equal(x0, plain) and logit.shape == (3,) and len(logit.unique()) == 3
        found.append(networks.pull_back(FAKE_SCORE, *inputs, None, logit=torch.ones(3)))
    assert found[0].abs().flatten(1).amax(1).min() > 0
    assert relative_error(found[1], found[0]) < 1e-4


@every
def test_a_step_embedding_changes_the_samples_of_its_step_alone(name: str) -> None:
    teacher = make_teacher(name)
    networks = make_networks(teacher, 1.0)
    fake_score = networks.denoisers[FAKE_SCORE] if isinstance(networks, SeparateNetworks) else teacher.denoiser
    networks.add_step_embedding(fake_score.get_submodule(teacher.family.time_embedding_name), 2)
    inputs = noisy(teacher)
    with torch.no_grad():
        networks.step_embedding[1] += torch.randn(networks.step_embedding.shape[1])
        without = networks.predict(FAKE_SCORE, *inputs)
        changes = networks.predict(FAKE_SCORE, *inputs, torch.tensor([0, 1, 1])) - without
    assert [float(change.abs().max()) > 1e-4 for change in changes] == [False, True, True]


@every
def test_the_default_guidance_is_what_the_stock_pipeline_uses_unless_it_is_told(name: str) -> None:
    family = FAMILIES[name]
    usual = signature(family.pipeline_class.__call__).parameters
    told = family.guided(family.default_guidance_scale)
    (scale,) = told.keys() & {"guidance_scale", "true_cfg_scale"}
    assert told[scale] == usual[scale].default


@pytest.mark.parametrize(("name", "told"), [("StableDiffusionPipeline", None), ("FluxPipeline", 3.5)])
def test_only_a_guidance_distilled_teacher_reads_prompts_with_a_guidance(
    name: str, told: float | None, teacher_folders
) -> None:
    teacher = load_teacher(str(teacher_folders(name)), torch.float32, options=PromptOptions(embedded_guidance=3.5))
    assert teacher.options.embedded_guidance == told


@every
def test_prompts_of_any_length_can_be_joined(name: str) -> None:
    teacher = make_teacher(name)
    parts = [teacher.encode_prompts([prompt]) for prompt in ("a", "a red seven on a blue background")]
    joined = Conditioning.cat([*parts, teacher.encode_nothing()])
    assert len(joined) == 3
    once = teacher.encode_prompts(["a", "a red seven on a blue background"])
    for key, tensor in once.tensors.items():
        assert torch.allclose(joined.tensors[key][:2].float(), tensor.float(), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["FluxPipeline", "QwenImagePipeline", "QwenImage21Pipeline", "Lumina2Pipeline", "Krea2Pipeline"]
)
def test_a_shift_of_times_by_the_size_of_images_is_the_stock_pipelines(name: str) -> None:
    teacher = make_teacher(name)
    teacher.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    teacher.pipeline(PROMPTS[0], num_inference_steps=4, output_type="latent", **CALLS[name])
    shift = teacher_shift(teacher, RunConfig.of(pretrained_model=name, resolution=CALLS[name]["height"]))
    expected = torch.tensor([shifted(1 - i / 4, shift) for i in range(4)])
    assert torch.allclose(teacher.pipeline.scheduler.sigmas[:4], expected)


def test_images_with_alpha_are_drawn_on_white_and_one_prompt_disturbs_no_other() -> None:
    pipeline = make_teacher("QwenImage21Pipeline").pipeline
    sampler = teacher_sampler(pipeline, "euler", 2, 1.0, batch_size=2, **CALLS["QwenImage21Pipeline"])
    together, _ = sampler(PROMPTS[:2], [0, 1])
    alone, _ = sampler(PROMPTS[1:2], [1])
    assert together.shape == (2, 3, 32, 32) and torch.equal(together[1:], alone)


def test_a_prompt_that_does_not_fit_is_named() -> None:
    teacher = make_teacher("QwenImage21Pipeline")
    with pytest.raises(ValueError, match=r"A prompt has 6\d\d tokens, and at most 512 are read; shorten 'words words"):
        teacher.encode_prompts(["a", "words " * 100])


def test_samples_with_prompts_of_one_length_go_through_the_network_together() -> None:
    teacher = make_teacher("QwenImage21Pipeline")
    conditioning = teacher.encode_prompts(["a", "b", "word", "c"])
    samples = torch.arange(4)
    assert [call[0].tolist() for call in teacher.family.calls(samples, samples, conditioning, None)] == [
        [0, 1],
        [2],
        [3],
    ]


@every
def test_latents_are_decoded_as_by_the_stock_pipeline(name: str) -> None:
    teacher = make_teacher(name)
    shape = teacher.family.latent_shape(teacher.pipeline, teacher.options.resolution)
    options = dict(num_inference_steps=1, **CALLS.get(name, {}))
    latents = torch.randn(2, *shape)
    teacher.pipeline.scheduler = teacher.family.stock_scheduler(teacher.pipeline.scheduler, 1, eta=0)
    with torch.no_grad():
        pictures, raw = (
            teacher.pipeline(
                prompt=list(PROMPTS[:2]), latents=stock_latents(name, latents), output_type=kind, **options
            ).images
            for kind in ("pt", "latent")
        )
    raw = own_latents(teacher.pipeline, raw, latents)
    assert (teacher.family.decode(teacher.pipeline, raw) - on_white(pictures)).abs().max() < 1e-5


@every
def test_encoding_inverts_decoding_as_far_as_the_autoencoder_can(name: str) -> None:
    teacher = make_teacher(name)
    vae = teacher.pipeline.vae
    if name == "StableDiffusionXLPipeline":  # as in the fine-tunes that state them
        vae.register_to_config(latents_mean=[0.1, 0.0, -0.1, 0.2], latents_std=[1.5, 1.0, 0.8, 1.2])
    images = torch.rand(2, 3, 32, 32)
    films = images.unsqueeze(2) if name in FILMS else images
    if name == "QwenImage21Pipeline":
        films = torch.cat([films, torch.ones_like(films[:, :1])], dim=1)  # opaque
    with torch.no_grad():
        encoded = vae.encode(films * 2 - 1)
        raw = encoded.latent if name == "SanaPipeline" else encoded.latent_dist.mode()
        decoded = vae.decode(raw, return_dict=False)[0].reshape(2, -1, *images.shape[2:])
        expected = on_white((decoded / 2 + 0.5).clamp(0, 1))
        latents = teacher.family.encode(teacher.pipeline, images)
        assert latents.shape[1:] == teacher.family.latent_shape(teacher.pipeline, teacher.options.resolution)
        assert relative_error(latents, raw.reshape(latents.shape)) > 0.01  # they are scaled
        assert (teacher.family.decode(teacher.pipeline, latents) - expected).abs().max() < 1e-5


@pytest.fixture(scope="module")
def teacher_folders(tmp_path_factory: pytest.TempPathFactory):
    """Saves a family's tiny teacher once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_pipeline(name).save_pretrained(made[name])
        return made[name]

    return folder


@loras
def test_a_lora_student_is_distilled_and_drawn_alike_by_anyone(
    name: str, teacher_folders, prompts_file: Path, tmp_path: Path
) -> None:
    folder, reading = teacher_folders(name), CALLS.get(name, {})
    own = {"resolution": reading.get("height"), "max_sequence_length": reading.get("max_sequence_length")}
    options = dict(train_batch_size=4, num_student_steps=4, guidance_scale=3.5)
    options |= {key: value for key, value in own.items() if value is not None}
    train_rdm_lora.main(run_arguments(folder, prompts_file, tmp_path, **options))
    student = RdmDistillationPipeline.from_pretrained(tmp_path)
    assert isinstance(student, getattr(rdm_diffusers.pipelines, f"Rdm{name}"))
    pictures = draw(student)
    assert torch.equal(pictures, draw(student))
    assert (draw(student, PROMPTS[1:3], first_seed=1) - pictures[1:]).abs().max() < 1e-4
    stock = stock_student(name, folder, tmp_path)
    latents = torch.randn(3, *FAMILIES[name].latent_shape(stock, reading.get("height")))
    ours = draw_from(student, stock_latents(name, latents))
    call = {"num_inference_steps": 4, **student.student.call_arguments}
    assert (ours - draw_from(stock, stock_latents(name, latents), **call)).abs().max() < 1e-4


def stock_student(name: str, teacher: Path, student: Path):
    """The student as a user of stock diffusers loads it."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "StableDiffusion3Pipeline" else {}
    pipeline = getattr(diffusers, name).from_pretrained(teacher, **absent)
    pipeline.load_lora_weights(student)
    config = json.loads((student / "scheduler" / "scheduler_config.json").read_text())
    pipeline.scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(student, subfolder="scheduler")
    assert type(pipeline) is getattr(diffusers, name)
    return pipeline


def draw_from(pipeline, latents: Tensor, **options: Any) -> Tensor:
    """Pictures of given noises; later noises come from the global generator, which every pipeline falls back on."""
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(6)
    return pipeline(prompt=list(PROMPTS[:3]), latents=latents, output_type="pt", **options).images
