"""A teacher that is a single file is the same teacher as its folder, and damaged or unknown files are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from parts import PROMPTS, run_arguments, train_only
from parts_families import make_pipeline as make_family
from parts_single_file import original, original_vae, original_z_image, write_file
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
    return {"folder": teacher_folder, "bare": bare, "file": write_file(folder / "anime_v3.safetensors", original(pipeline))}


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


def test_a_run_of_a_file_is_recorded_exported_resumed_and_evaluated(argv, places: dict[str, Path], tmp_path: Path) -> None:
    train_rdm_lora.main(argv(max_train_steps=2, checkpointing_steps=1))
    run, student = tmp_path / "run", StudentConfig.load(str(tmp_path / "run"))
    assert student.base_model_name_or_path == str(places["file"])
    assert student.base_file == {
        "config": str(places["bare"]), "sha256": digest_of_file(places["file"]), "parts": ["text_encoder", "unet", "vae"],
    }  # fmt: skip
    assert student.format_version == 3
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


def test_full_students_stand_alone_and_name_no_path_of_this_machine(argv, places: dict[str, Path], tmp_path: Path) -> None:
    train_rdm_full.main(argv(rank=None))
    student = StudentConfig.load(str(tmp_path / "run"))
    assert student.base_file is None and student.teacher == "anime_v3.safetensors (a local file)"
    assert student.arguments["single_file_config"] == "bare (a local folder)"
    assert check_student(tmp_path / "run").teacher == student.teacher
    card = (tmp_path / "run" / "README.md").read_text()
    assert "base_model" not in card and str(places["file"].parent) not in card
    assert "student of anime_v3.safetensors" in card
