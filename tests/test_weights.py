"""Weights that are missing, damaged, of another network, of another variant or pickled are refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from parts import run_arguments
from parts_families import make_pipeline
from safetensors.torch import load_file, save_file

from rdm_diffusers import RdmDistillationPipeline
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.families import check_pipeline, load_teacher, load_vae, pipeline_config
from rdm_diffusers.training.memory_plan import plan_memory

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
parts = pytest.mark.parametrize("part", WEIGHTS)


@pytest.fixture
def teacher(teacher_folder: Path, tmp_path: Path) -> Path:
    """A copy of the teacher, to be damaged."""
    return shutil.copytree(teacher_folder, tmp_path / "teacher")


def weights_of(folder: Path, part: str) -> Path:
    return folder / part / f"{WEIGHTS[part]}.safetensors"


def change(folder: Path, part: str, change: Callable[[dict], None]) -> None:
    tensors = load_file(weights_of(folder, part))
    change(tensors)
    save_file(tensors, weights_of(folder, part), {"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_teacher(str(folder), torch.float32)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "TEACHER")


@parts
def test_a_teacher_that_lacks_tensors_is_refused_by_their_names(part: str, teacher: Path) -> None:
    gone = sorted(load_file(weights_of(teacher, part)))[3:8]
    change(teacher, part, lambda tensors: [tensors.pop(name) for name in gone])
    assert refusal(teacher) == (
        f"The teacher TEACHER cannot be loaded: its {part} lacks {', '.join(gone[:3])} and 2 others; save or download "
        "it again."
    )


@parts
def test_a_single_missing_tensor_is_enough(part: str, teacher: Path) -> None:
    gone = sorted(load_file(weights_of(teacher, part)))[-1]
    change(teacher, part, lambda tensors: tensors.pop(gone))
    assert f"its {part} lacks {gone};" in refusal(teacher)


@parts
def test_a_tensor_of_another_shape_is_refused(part: str, teacher: Path) -> None:
    name = sorted(load_file(weights_of(teacher, part)))[2]
    change(teacher, part, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    assert f"its {part} has shapes that differ from its config.json, in {name};" in refusal(teacher)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_tensors_that_the_network_does_not_have_are_refused(part: str, teacher: Path) -> None:
    change(teacher, part, lambda tensors: tensors.update({"control.weight": torch.zeros(2)}))
    assert f"its {part} has tensors that its config.json does not have, control.weight;" in refusal(teacher)


def test_a_head_that_the_text_encoder_does_not_need_is_taken(teacher: Path) -> None:
    change(teacher, "text_encoder", lambda tensors: tensors.update({"lm_head.weight": torch.zeros(2)}))
    load_teacher(str(teacher), torch.float32)


@parts
def test_a_cut_off_file_is_refused(part: str, teacher: Path) -> None:
    file = weights_of(teacher, part)
    file.write_bytes(file.read_bytes()[:1000])
    assert f"The teacher TEACHER cannot be loaded: its {part} is damaged (" in refusal(teacher)


@parts
def test_missing_weights_are_refused(part: str, teacher: Path) -> None:
    weights_of(teacher, part).unlink()
    assert refusal(teacher) == f"The teacher TEACHER has no weights of its {part}; save or download it again."


def test_a_shard_that_is_missing_or_lacks_a_tensor_is_refused(teacher: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    shutil.rmtree(teacher / "unet")
    pipeline.unet.save_pretrained(teacher / "unet", max_shard_size="200KB")
    shards = sorted((teacher / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    load_teacher(str(teacher), torch.float32)
    tensors = load_file(shards[0])
    gone = sorted(tensors)[0]
    tensors.pop(gone)
    save_file(tensors, shards[0], {"format": "pt"})
    assert gone in refusal(teacher)
    shards[1].unlink()
    assert "its unet is damaged (" in refusal(teacher)


def as_variant(folder: Path, *components: str) -> Path:
    for part in components:
        weights_of(folder, part).rename(folder / part / f"{WEIGHTS[part]}.fp16.safetensors")
    return folder


def as_pickles(folder: Path) -> Path:
    for part in WEIGHTS:
        weights_of(folder, part).rename(folder / part / f"{WEIGHTS[part]}.bin")
    return folder


def dry_run(folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    plan_memory(parse_args(run_arguments(folder, prompts_file, tmp_path / "out"), student="lora"))


FP16 = "The teacher TEACHER has its {} in the variant fp16 only; add --variant fp16, or in Python variant='fp16'."


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_teacher_in_half_precision_only_names_the_flag(
    part: str, teacher: Path, prompts_file: Path, tmp_path: Path
) -> None:
    assert refusal(as_variant(teacher, part)) == FP16.format(part)
    with pytest.raises(ValueError, match="add --variant fp16"):
        dry_run(teacher, prompts_file, tmp_path)
    load_teacher(str(teacher), torch.float32, variant="fp16")


def test_a_variant_lacks_no_tensors_either(teacher: Path) -> None:
    gone = sorted(load_file(weights_of(teacher, "unet")))[0]
    change(teacher, "unet", lambda tensors: tensors.pop(gone))
    with pytest.raises(ValueError, match=f"its unet lacks {gone};"):
        load_teacher(str(as_variant(teacher, *WEIGHTS)), torch.float32, variant="fp16")


def test_a_variant_that_is_not_there_names_those_that_are(teacher: Path) -> None:
    with pytest.raises(ValueError, match="has no files of the variant bf16; it has fp16"):
        load_teacher(str(as_variant(teacher, "unet")), torch.float32, variant="bf16")


def test_pickled_weights_are_refused_also_before_a_run_is_tried(
    teacher: Path, prompts_file: Path, tmp_path: Path
) -> None:
    said = r"has only pickled weights \(\w+/\w+\.bin\), which can run code and are refused; if you trust them"
    with pytest.raises(ValueError, match=said):
        load_teacher(str(as_pickles(teacher)), torch.float32)
    with pytest.raises(ValueError, match=said):
        dry_run(teacher, prompts_file, tmp_path)


def test_what_is_replaced_need_not_be_whole(teacher: Path, teacher_folder: Path) -> None:
    weights_of(teacher, "vae").unlink()
    load_teacher(str(teacher), torch.float32, vae=str(teacher_folder / "vae"))


def test_another_autoencoder_that_lacks_a_tensor_is_refused(teacher: Path) -> None:
    gone = sorted(load_file(weights_of(teacher, "vae")))[0]
    change(teacher, "vae", lambda tensors: tensors.pop(gone))
    with pytest.raises(ValueError, match=f"The autoencoder {teacher}/vae cannot be loaded: its network lacks {gone};"):
        load_vae(str(teacher / "vae"), pipeline_config(str(teacher)), torch.float32)


@pytest.mark.parametrize(
    "name", ["StableDiffusion3Pipeline", "QwenImagePipeline", "SanaPipeline", "PixArtSigmaPipeline"]
)
def test_whole_teachers_of_other_families_pass_and_those_that_lack_a_tensor_do_not(name: str, tmp_path: Path) -> None:
    make_pipeline(name).save_pretrained(tmp_path)
    config = pipeline_config(str(tmp_path))
    check_pipeline("teacher", str(tmp_path), config)
    for file in sorted(tmp_path.glob("*/*.safetensors")):
        whole, tensors = file.read_bytes(), load_file(file)
        gone = sorted(tensors)[len(tensors) // 2]
        save_file({key: tensor for key, tensor in tensors.items() if key != gone}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"its {file.parent.name} lacks "):
            check_pipeline("teacher", str(tmp_path), config)
        file.write_bytes(whole)


def test_a_full_student_and_a_students_base_that_lack_tensors_are_refused(tiny_student: Path, tmp_path: Path) -> None:
    RdmDistillationPipeline.from_pretrained(tiny_student).save_pretrained(tmp_path / "full")
    gone = sorted(load_file(weights_of(tmp_path / "full", "unet")))[0]
    change(tmp_path / "full", "unet", lambda tensors: tensors.pop(gone))
    with pytest.raises(ValueError, match=f"The student .* cannot be loaded: its unet lacks {gone};"):
        RdmDistillationPipeline.from_pretrained(tmp_path / "full")
    (tmp_path / "full" / "rdm_config.json").unlink()
    with pytest.raises(ValueError, match=f"The teacher .* cannot be loaded: its unet lacks {gone};"):
        RdmDistillationPipeline.from_lora(tmp_path / "full", tiny_student)


@pytest.mark.parametrize("inside", [True, False])
def test_a_checkpoint_in_the_place_of_a_student_or_a_teacher_names_rdm_export(inside: bool, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text(json.dumps({}))
    given = checkpoint if inside else tmp_path
    said = rf"write its student first with `rdm-export {checkpoint} --output_dir STUDENT`, and give that\."
    for load in (RdmDistillationPipeline.from_pretrained, lambda folder: load_teacher(str(folder), torch.float32)):
        with pytest.raises(ValueError, match=said):
            load(given)
