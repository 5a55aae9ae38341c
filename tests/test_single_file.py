"""A teacher that is a single file is the same teacher as its folder, and damaged or unknown files are refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from parts import PROMPTS, run_arguments, train_only
from parts_families import make_pipeline as make_family
from parts_single_file import original, write_file
from safetensors.torch import load_file
from test_cards import snippets

import train_rdm_full
import train_rdm_lora
from rdm_diffusers.commands import export
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.evaluation.command import main as evaluate
from rdm_diffusers.families import SingleFile, Teacher, load_denoiser, load_teacher
from rdm_diffusers.folders import digest_of_file
from rdm_diffusers.hub import check_student, write_card
from rdm_diffusers.hub.card import facts_of, render
from rdm_diffusers.hub.student_files import places_of
from rdm_diffusers.pipelines import RdmDistillationPipeline, StudentConfig
from rdm_diffusers.training.trainer import Trainer


def save(pipeline: DiffusionPipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def weights_of(teacher: Teacher) -> dict[str, torch.Tensor]:
    parts = teacher.pipeline.components.items()
    return {f"{name}.{key}": tensor for name, part in parts if isinstance(part, torch.nn.Module)
            for key, tensor in part.state_dict().items()}  # fmt: skip


def assert_same(one: Teacher, other: Teacher) -> None:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(tensor.is_meta for tensor in ours.values())


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_file_with_all_networks_is_the_teacher_of_its_folder_bit_for_bit(name: str, tmp_path: Path) -> None:
    folder = save(make_family(name), tmp_path / "folder")
    whole = load_teacher(str(folder), torch.float32)
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    file = str(write_file(tmp_path / "model.safetensors", original(whole.pipeline)))
    teacher = load_teacher(file, torch.float32, single_file_config=str(bare))
    assert_same(teacher, whole)
    assert teacher.name == file and teacher.file.config == str(bare)
    conditioning = teacher.encode_prompts(["a red seven"])
    x_t = torch.randn(1, *teacher.family.latent_shape(teacher.pipeline, None))
    ours, theirs = (
        each.family.denoise(each.denoiser, x_t, torch.tensor([500]), conditioning) for each in (teacher, whole)
    )
    assert torch.equal(ours, theirs)
    copy = load_denoiser(file, torch.float32, single_file_config=str(bare))
    assert copy is not teacher.denoiser
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), teacher.denoiser.parameters(), strict=True))


@pytest.fixture(scope="module")
def places(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher's folder, its configuration without weights, and the same teacher as a single file."""
    folder = tmp_path_factory.mktemp("single-file")
    pipeline = DiffusionPipeline.from_pretrained(teacher_folder)
    bare = shutil.copytree(teacher_folder, folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return {
        "folder": teacher_folder,
        "bare": bare,
        "file": write_file(folder / "anime_v3.safetensors", original(pipeline)),
    }


@pytest.fixture
def argv(places: dict[str, Path], prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run whose teacher is the file."""

    def make(folder: str = "run", teacher: str = "file", **changes) -> list[str]:
        options = {"single_file_config": places["bare"] if teacher == "file" else None, **changes}
        return run_arguments(places[teacher], prompts_file, tmp_path / folder, cache_dir=tmp_path / "cache", **options)

    return make


def image(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(1), output_type="pt").images


def test_a_student_of_the_file_is_the_student_of_the_folder_bit_for_bit(argv, tmp_path: Path) -> None:
    for teacher in ("file", "folder"):
        train_only(argv(teacher, teacher))
    ours, theirs = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("file", "folder"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (image(RdmDistillationPipeline.from_pretrained(tmp_path / name)) for name in ("file", "folder"))
    assert torch.equal(ours, theirs)


def test_a_run_of_a_file_is_recorded_exported_resumed_and_evaluated(
    argv, places: dict[str, Path], tmp_path: Path
) -> None:
    train_rdm_lora.main(argv(max_train_steps=2, checkpointing_steps=1))
    run, student = tmp_path / "run", StudentConfig.load(str(tmp_path / "run"))
    assert student.base_model_name_or_path == str(places["file"])
    assert student.base_file == {
        "config": str(places["bare"]),
        "sha256": digest_of_file(places["file"]),
        "parts": ["unet", "text_encoder", "vae"],
    }
    assert student.format_version == 1  # older releases refuse the file by its name
    assert (run / "samples.png").exists()
    whole = image(RdmDistillationPipeline.from_pretrained(run))
    export.main([str(run / "checkpoint-2"), "--format", "lora", "--output_dir", str(tmp_path / "again")])
    assert torch.equal(image(RdmDistillationPipeline.from_pretrained(tmp_path / "again")), whole)
    train_only(argv("whole", max_train_steps=3))
    train_only(argv(max_train_steps=3, resume_from_checkpoint="latest"))
    ours, theirs = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red seven\na blue one\n")
    flags = ["--num_images", "2", "--prompts", str(prompts), "--features", "tiny", "--output_dir"]
    record = evaluate(["--student", str(run), *flags, str(tmp_path / "evaluated")])
    assert record is not None


def test_full_students_stand_alone_and_name_no_path_of_this_machine(
    argv, places: dict[str, Path], tmp_path: Path
) -> None:
    train_rdm_full.main(argv(rank=None))
    student = StudentConfig.load(str(tmp_path / "run"))
    assert student.base_file is None and student.teacher == "anime_v3.safetensors (a local file)"
    assert student.arguments["single_file_config"] == "bare (a local folder)"
    assert check_student(tmp_path / "run").teacher == student.teacher
    card = (tmp_path / "run" / "README.md").read_text()
    assert "base_model" not in card and str(places["file"].parent) not in card
    assert "student of anime_v3.safetensors" in card


def test_the_card_of_a_files_student_loads_it_with_our_package_and_with_diffusers(
    argv, places: dict[str, Path], tmp_path: Path
) -> None:
    train_only(argv())
    card = write_card(tmp_path / "run").read_text()
    assert "student of anime_v3.safetensors\n" in card and "base_model:" not in card
    ours, stock = snippets(card)
    assert f'from_single_file("{places["file"]}", config="{places["bare"]}", dtype=torch.float32)' in stock
    drawn = []
    for code in (ours, stock):
        exec(code, names := {})
        drawn.append(names["pipeline"].unet)
    assert all(torch.equal(a, b) for a, b in zip(*(each.parameters() for each in drawn), strict=True))


def test_no_push_names_a_file_of_this_machine_but_one_of_the_hub_is_its_repository(argv, tmp_path: Path) -> None:
    train_only(argv())
    run = tmp_path / "run"
    with pytest.raises(
        ValueError, match=r"needs .*/anime_v3.safetensors, a file that others do not have; train it from"
    ):
        check_student(run)
    facts = facts_of(run, "me/student")
    for name, config, base, shown in (
        (
            "me/models/xl/anime_v3.safetensors",
            "stabilityai/sd",
            "me/models",
            "in [me/models](https://huggingface.co/me",
        ),
        (
            "/data/anime_v3.safetensors",
            "stabilityai/sd",
            "stabilityai/sd",
            "with the configuration of [stabilityai/sd]",
        ),
        ("/data/anime_v3.safetensors", "/data/configuration", None, "a LoRA for `anime_v3.safetensors`."),
        ("/data/anime_v3.safetensors", "tiny", None, "a LoRA for `anime_v3.safetensors`."),
    ):
        file = {**facts.student.base_file, "config": config}
        student = replace(facts.student, base_model_name_or_path=name, base_file=file)
        card = render(replace(facts, student=student))
        assert card.data.base_model == base and shown in card.text
        assert ("https://huggingface.co/me/models/blob/main/xl/anime_v3.safetensors" in card.text) == (
            base == "me/models"
        )
    assert places_of("me/models/anime.safetensors", SingleFile("me/models/anime.safetensors", "owner/sd")) == [
        "me/models", "owner/sd",
    ]  # fmt: skip


def test_another_file_under_the_same_name_is_noticed(argv, places: dict[str, Path], tmp_path: Path) -> None:
    file = shutil.copy(places["file"], tmp_path / "model.safetensors")
    flags = {"pretrained_model_name_or_path": file, "max_train_steps": 2, "checkpointing_steps": 1}
    train_only(argv(**flags))
    write_file(file, {name: 2 * tensor for name, tensor in load_file(file).items()})
    with pytest.warns(
        UserWarning, match="model.safetensors was changed since it was exported, as base_file in rdm_conf"
    ):
        RdmDistillationPipeline.from_pretrained(tmp_path / "run")
    resumed = argv(**{**flags, "max_train_steps": 3}, resume_from_checkpoint="latest")
    with (
        pytest.raises(ValueError, match="other arguments: another teacher's file under the same name; set them back"),
        Trainer(parse_args(resumed)) as trainer,
    ):
        trainer.check()
    Path(file).unlink()
    with pytest.raises(
        ValueError, match=r"model.safetensors does not exist; check the path, or give a file on the Hub"
    ):
        RdmDistillationPipeline.from_pretrained(tmp_path / "run")


def test_a_student_may_be_put_on_a_file(argv, places: dict[str, Path], tmp_path: Path) -> None:
    train_only(argv(teacher="folder"))
    on_file = RdmDistillationPipeline.from_lora(places["file"], tmp_path / "run", config=str(places["bare"]))
    assert torch.equal(image(on_file), image(RdmDistillationPipeline.from_pretrained(tmp_path / "run")))


def test_a_dry_run_reads_the_configuration_and_the_files_header_alone(argv, capsys: pytest.CaptureFixture) -> None:
    train_rdm_lora.main(argv(dry_run=True))
    assert "unet, frozen" in capsys.readouterr().out


def test_a_teachers_file_is_evaluated(places: dict[str, Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red seven\na blue one\n")
    flags = ["--prompts", str(prompts), "--features", "tiny", "--num_inference_steps", "2"]
    config = ["--single_file_config", str(places["bare"])]
    for name, own in (("file", config), ("folder", [])):
        evaluate(["--teacher", str(places[name]), *own, *flags, "--output_dir", str(tmp_path / name)])
    ours, theirs = (sorted((tmp_path / name / "images").glob("*.png")) for name in ("file", "folder"))
    assert len(ours) == 2 and [each.read_bytes() for each in ours] == [each.read_bytes() for each in theirs]
