"""A teacher that is a single file is the same teacher as its folder, and damaged or unknown files are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from parts import make_pipeline
from parts_families import make_pipeline as make_family
from parts_single_file import original, original_vae, original_z_image, write_file
from safetensors.torch import load_file

from rdm_diffusers.families import Teacher, load_denoiser, load_teacher


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
