"""A teacher with LoRAs, what its students are LoRAs for, and students that start from another LoRA."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from parts import PROMPTS, change, make_run, relative_error, run_arguments, train_only, train_run
from parts_families import make_pipeline as make_family
from parts_float64 import ROUNDING
from parts_loras import RANK, write_loras
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_cards import snippets

import train_rdm_lora
from rdm_diffusers.commands import export
from rdm_diffusers.config import RunConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.families import FAMILIES, LORA_FILE, Lora, LoraLayers, add_layers, load_teacher, read_lora
from rdm_diffusers.hub import check_student, write_card
from rdm_diffusers.hub.comfyui import as_comfyui
from rdm_diffusers.hub.joined_lora import join_loras
from rdm_diffusers.networks import FAKE_SCORE, STUDENT, TEACHER
from rdm_diffusers.pipelines import RdmDistillationPipeline, StudentConfig
from rdm_diffusers.training import assembly
from rdm_diffusers.training.embeddings import fingerprint_of
from rdm_diffusers.training.teacher_checks import ADAPTED, check_with_teacher
from rdm_diffusers.training.trainer import Trainer


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The LoRAs of these tests, by what they are."""
    return write_loras(tmp_path_factory.mktemp("loras"))


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run with LoRAs."""

    def make(folder: str = "run", **changes) -> list[str]:
        options = {"cache_dir": tmp_path / "cache", **changes}
        return run_arguments(teacher_folder, prompts_file, tmp_path / folder, **options)

    return make


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    """Runs that load their teacher in float64, before LoRAs are added to it."""
    monkeypatch.setitem(assembly.DTYPES, "no", torch.float64)


def image(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipeline(PROMPTS[0], num_inference_steps=1, guidance_scale=0, generator=generator, output_type="np").images


def predictions(it, *roles: str) -> list[torch.Tensor]:
    x_t = torch.randn(4, *it.distillation.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning = it.distillation.prompts.once([0, 1, 2, 3])
    with torch.no_grad():
        return [it.networks.predict(role, x_t, torch.full((4,), 500), conditioning) for role in roles]


def stock(teacher: Path, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(teacher, dtype=dtype)


def test_a_teacher_has_its_loras_in_the_weights_of_all_its_networks(teacher_folder: Path, loras: dict) -> None:
    own = load_teacher(str(teacher_folder), torch.float32, loras=[Lora.parse(f"{loras['with text']}:0.5")])
    adapted = stock(teacher_folder)
    adapted.load_lora_weights(loras["with text"], adapter_name="style")
    adapted.set_adapters(["style"], [0.5])
    plain = load_teacher(str(teacher_folder), torch.float32)
    drawn, expected, before = (image(each) for each in (own.pipeline, adapted, plain.pipeline))
    assert np.abs(drawn - expected).max() < 1e-5 < 1e-3 < np.abs(drawn - before).max()
    assert not any("lora" in name for part in (own.denoiser, own.pipeline.text_encoder) for name in part.state_dict())
    assert fingerprint_of(own, PROMPTS) != fingerprint_of(plain, PROMPTS)  # so the cached prompts are its own


def test_files_for_comfyui_are_loras_of_a_teacher_too(teacher_folder: Path, loras: dict, tmp_path: Path) -> None:
    weights = load_file(loras["few-step"] / LORA_FILE)
    save_file(as_comfyui(weights, 2 * RANK, FAMILIES["StableDiffusionPipeline"], {}), tmp_path / "kohya.safetensors")
    own, other = (load_teacher(str(teacher_folder), torch.float32, loras=[Lora.parse(str(path))]).denoiser
                  for path in (loras["few-step"], tmp_path / "kohya.safetensors"))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_lora])
def test_one_file_does_what_the_teachers_lora_and_the_students_do_in_every_family(name: str, tmp_path: Path) -> None:
    family, pipeline = FAMILIES[name], make_family(name)
    pipeline.save_pretrained(tmp_path / "plain")
    denoiser = family.denoiser(pipeline)
    own, added = (
        make_matrices(denoiser, layers, seed)
        for seed, layers in enumerate([family.lora_target_modules[:2], family.lora_target_modules[1:3]])
    )
    outermost = {key: layer for key, layer in denoiser.named_modules() if isinstance(layer, torch.nn.Linear)
                 and "." not in key}  # fmt: skip
    added |= make_matrices(denoiser, list(outermost), 2, exactly=True)  # FLUX's blocks have a `proj_out`, too
    weights = {f"{key}.lora_{side}.weight": each for key, pair in own.items() for side, each in zip("AB", pair)}  # noqa: B905
    joined, shape = join_loras(denoiser, added, weights, LoraConfig(r=RANK, lora_alpha=2 * RANK))
    described = {f"{family.denoiser_name}_lora_adapter_metadata": shape.to_dict()}
    family.pipeline_class.save_lora_weights(
        tmp_path / "joined", **{f"{family.denoiser_name}_lora_layers": joined}, **described
    )
    lora = Lora(str(tmp_path / "joined"))
    teacher = load_teacher(str(tmp_path / "plain"), torch.float32, loras=[lora])
    for layers in (added, {key: (down, 2 * up) for key, (down, up) in own.items()}):
        add_layers(denoiser, layers)
    for expected, weight in zip(denoiser.parameters(), teacher.denoiser.parameters(), strict=True):
        assert torch.allclose(weight, expected, rtol=0, atol=1e-5)
    teacher.drop_text_encoders()
    assert read_lora(teacher.pipeline, lora)[family.denoiser_name].keys() >= own.keys() | added.keys()


def make_matrices(network: torch.nn.Module, names, seed: int, exactly: bool = False) -> LoraLayers:
    """Random matrices for the layers that end with these names, or have them."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for key, layer in network.named_modules():
        if isinstance(layer, ADAPTED) and any(key == name or f".{key}".endswith(f".{name}") for name in names):
            if exactly and key not in names:
                continue
            outputs, *inputs = layer.weight.shape
            down, up = (RANK, *inputs), (outputs, RANK, *[1] * (len(inputs) - 1))
            found[key] = tuple(0.1 * torch.randn(shape, generator=generator) for shape in (down, up))
    return found


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("student_base", ["plain", "teacher"])
def test_the_exported_student_draws_what_the_student_of_the_run_draws(
    student_base: str, argv, loras: dict, teacher_folder: Path, tmp_path: Path
) -> None:
    changes = {"teacher_lora": f"{loras['style']}:0.5", "student_base": student_base, "lora_alpha": 3}
    it = make_run([*argv(**changes, max_train_steps=1), "--no-use_ema"])
    train_run(it)
    folder = it.export()
    student = StudentConfig.load(str(folder))
    assert [(lora.name, lora.scale) for lora in student.loras] == (
        [(str(loras["style"] / LORA_FILE), 0.5)] if student_base == "teacher" else []
    )
    assert student.format_version == (2 if student.loras else 1)  # older releases would leave the LoRA out

    ours, adapted = (
        RdmDistillationPipeline.from_pretrained(folder, dtype=torch.float64),
        stock(teacher_folder, torch.float64),
    )
    for lora in student.loras:
        adapted.load_lora_weights(lora.place[0], weight_name=lora.place[1], adapter_name="style")
    adapted.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name="student")
    names, scales = ["style", "student"], [0.5, 1.0]
    adapted.set_adapters(names if student.loras else names[1:], scales if student.loras else scales[1:])
    adapted.scheduler = ours.scheduler
    others = [image(ours), image(adapted)]
    ours.unet, drawn = it.networks.denoiser, {}
    for role in (STUDENT, TEACHER):
        with it.networks.acting_as(role):
            drawn[role] = image(ours)
    assert np.abs(drawn[STUDENT] - drawn[TEACHER]).max() > 1e-3
    assert max(np.abs(drawn[STUDENT] - other).max() for other in others) < ROUNDING


def test_the_card_loads_both_loras_or_says_that_the_student_has_both(argv, loras: dict) -> None:
    flags = {"teacher_lora": f"{loras['style']}:0.5", "init_lora": loras["few-step"], "rank": None}
    it = make_run(argv(**flags, student_base="teacher"))
    folder = it.export()
    text = write_card(folder).read_text()
    assert f"It needs its base model with the LoRA `{LORA_FILE}` at 0.5: load both, as below." in text
    assert "| teacher's LoRAs | style:0.5 |" in text and "| started from | few-step |" in text
    exec(snippets(text)[1], names := {})
    reference = RdmDistillationPipeline.from_pretrained(folder)
    names["pipeline"].scheduler = reference.scheduler
    assert np.abs(image(names["pipeline"]) - image(reference)).max() < 1e-4
    change(it, "student", student_base="plain")
    plain = write_card(it.export()).read_text()
    assert "Its teacher had the LoRA `style:0.5`; this student includes that." in plain
    assert "set_adapters" not in plain


@pytest.mark.usefixtures("double")
def test_a_full_student_begins_as_the_teacher_with_its_lora(argv, loras: dict) -> None:
    it = make_run(argv(teacher_lora=loras["style"], rank=None), "full")
    it.networks.guidance_scale = 1.0
    own, fake, teacher = predictions(it, STUDENT, FAKE_SCORE, TEACHER)
    plain = make_run(argv("plain", rank=None), "full")
    assert max(relative_error(own, teacher), relative_error(fake, teacher)) < ROUNDING
    assert relative_error(own, predictions(plain, STUDENT)[0]) > 1e-2


@pytest.mark.usefixtures("double")
def test_a_student_that_starts_from_a_lora_draws_as_it_does_until_it_learns(
    argv, loras: dict, teacher_folder: Path
) -> None:
    flags = {"rank": 5, "lora_alpha": 2, "fold_adapters": True}  # neither the LoRA's rank nor its alpha
    it = make_run(argv(init_lora=loras["few-step"], **flags))
    student = RdmDistillationPipeline.from_pretrained(it.export(), dtype=torch.float64)
    adapted = stock(teacher_folder, torch.float64)
    adapted.load_lora_weights(loras["few-step"])
    adapted.scheduler = student.scheduler
    assert np.abs(image(student) - image(adapted)).max() < ROUNDING
    fresh = make_run(argv("fresh", **flags))
    assert torch.equal(*(predictions(each, FAKE_SCORE)[0] for each in (it, fresh)))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"teacher_lora": "nowhere/at/all.safetensors"}, "The LoRA 'nowhere/at' is neither a local folder nor"),
        ({"teacher_lora": "./gone.safetensors"}, r"The LoRA ./gone.safetensors does not exist; check the path"),
        ({"teacher_lora": "empty"}, "holds no LoRA; give a safetensors file, or a folder or Hub id with one"),
        ({"teacher_lora": "pickled"}, "has only pickled weights, which can run code and are refused"),
        ({"teacher_lora": "cut"}, "cut.safetensors is damaged"),
        ({"teacher_lora": "dora"}, "is a DoRA, which cannot be used here; give a plain LoRA"),
        ({"teacher_lora": "hostile"}, "has no list of layers' names in its target_modules"),
        ({"teacher_lora": "wide"}, "does not fit this StableDiffusionPipeline .*; give one that was made for the same"),
        ({"teacher_lora": "elsewhere"}, "does not fit this StableDiffusionPipeline .*; give one that was made"),
        ({"teacher_lora": "with text"}, "adapts the text_encoder, too, .*; add --student_base teacher"),
        ({"teacher_lora": "style:0"}, "The scale '0' in .* must be a finite number other than 0; write PATH_OR_ID"),
        ({"teacher_lora": "style:big"}, "The scale 'big' in .* must be a finite number other than 0"),
        ({"teacher_lora": ["style", "style:2"]}, "--teacher_lora names one LoRA twice"),
        ({"teacher_lora": "style", "base_quantization": "int8"}, "cannot be added exactly to weights in int8"),
        ({"student_base": "teacher"}, "--student_base would have no effect; leave it out, or add --teacher_lora"),
        (
            {"init_lora": "few-step", "rank": 2},
            "is of rank 3, more than --rank 2; leave --rank out, or give",
        ),
        ({"init_lora": "style", "rank": None}, "adapts conv_in, time_embedding.linear_1, which the student does not;"),
        ({"init_lora": "with text"}, "adapts the text_encoder, which a student does not; give another"),
        ({"init_lora": "few-step:0.5"}, "has a scale, which only --teacher_lora takes; leave it out"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_before_any_weights_are_read(
    flags: dict, reason: str, teacher_folder: Path, loras: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def path(text: str) -> str:
        name, colon, scale = text.partition(":")
        return f"{loras[name]}{colon}{scale}" if name in loras else text

    for flag in ("teacher_lora", "init_lora"):
        given = flags.get(flag)
        if given:
            flags = flags | {flag: [path(each) for each in given] if isinstance(given, list) else path(given)}
    with pytest.raises(ValueError, match=reason):
        check_with_teacher(RunConfig.of("lora", pretrained_model_name_or_path=str(teacher_folder), **flags))


def test_a_run_resumes_with_the_same_loras_alone(argv, loras: dict, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("style", "few-step")}
    for name, file in files.items():
        file.write_bytes((loras[name] / LORA_FILE).read_bytes())
    flags = {"teacher_lora": files["style"], "init_lora": files["few-step"], "rank": None, "checkpointing_steps": 1}
    train_only(argv(**flags))
    export.main([str(tmp_path / "run" / "checkpoint-2"), "--format", "lora", "--output_dir", str(tmp_path / "again")])
    of_run, of_checkpoint = (load_file(tmp_path / name / LORA_FILE) for name in ("run", "again"))
    assert all(torch.equal(of_run[name], of_checkpoint[name]) for name in of_run.keys() | of_checkpoint.keys())
    resumed = argv(**flags, resume_from_checkpoint="latest")
    with Trainer(parse_args(resumed)) as trainer:
        trainer.check()
    saved = trainer.config.as_yaml()
    assert "rank: 3" in saved and str(files["style"]) in saved
    save_file({name: 2 * each for name, each in load_file(files["few-step"]).items()}, files["few-step"])
    with (
        Trainer(parse_args(resumed)) as trainer,
        pytest.raises(ValueError, match="other contents of --teacher_lora"),
    ):
        trainer.check()
    with (
        Trainer(parse_args(argv(**{**flags, "teacher_lora": None}, resume_from_checkpoint="latest"))) as trainer,
        pytest.raises(ValueError, match="--teacher_lora"),
    ):
        trainer.check()


def test_a_run_with_a_lora_of_the_text_encoder_draws_and_reloads_its_student(
    argv, loras: dict, recwarn: pytest.WarningsRecorder
) -> None:
    train_rdm_lora.main(argv(teacher_lora=f"{loras['with text']}:0.5", student_base="teacher"))
    folder = Path(argv()[argv().index("--output_dir") + 1])
    assert (folder / "samples.png").exists() and not [each for each in recwarn if "is safe" in str(each.message)]
    own = StudentConfig.load(str(folder))
    entries = {"name": str(loras["with text"] / LORA_FILE), "scale": 0.5}
    assert [{name: lora[name] for name in entries} for lora in own.base_loras] == [entries]
    replace(own, base_model_name_or_path="me/teacher").save(folder)
    with pytest.raises(ValueError, match=re.escape(f"needs {loras['with text']}, a folder that others do not have")):
        check_student(folder)
