"""Teachers and LoRAs that are distilled to few steps already are refused where that is certain, else warned of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from parts import run_arguments
from parts_families import make_flux, make_sdxl
from parts_loras import OWN, write_lora
from safetensors.torch import load_file, save_file

from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.families import INDEX, LORA_FILE, STUDENT_CONFIG, few_step_warning, load_teacher
from rdm_diffusers.families.few_steps import few_step_word
from rdm_diffusers.training.teacher_checks import check_with_teacher

WHAT_IT_MEANS = "Guidance harms such a teacher, and its scores are untrained at most times."


@pytest.fixture
def check(prompts_file: Path, tmp_path: Path):
    """Checks a run of a teacher, of whose files only the configurations are needed."""

    def run(teacher: Path, **changes) -> None:
        check_with_teacher(parse_args(run_arguments(teacher, prompts_file, tmp_path / "run", **changes)))

    return run


def named(teacher: Path, folder: Path, **entries) -> Path:
    """A copy of a teacher's configurations under another name, with other entries in its `model_index.json`."""
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, **entries}))
    return folder


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("black-forest-labs/FLUX.1-schnell", "schnell"),
        ("stabilityai/sd-turbo", "turbo"),
        ("stabilityai/stable-diffusion-3.5-large-turbo", "turbo"),
        ("Tongyi-MAI/Z-Image-Turbo", "Turbo"),
        ("black-forest-labs/FLUX.2-klein-9B", "klein"),
        ("ByteDance/SDXL-Lightning", "Lightning"),
        ("models/dreamshaperXL_v21TurboDPMSDE.safetensors", "Turbo"),
        ("models/realvisxlV40_v40LightningBakedvae.safetensors", "Lightning"),
        ("me/sdxl_8step.safetensors", "8step"),
        ("SimianLuo/LCM_Dreamshaper_v7", "LCM"),
        ("tianweiy/DMD2", "DMD2"),
        ("/cache/hub/models--stabilityai--sdxl-turbo/snapshots/71153311d3dbb46851df1931d3ca6e939de83304", "turbo"),
        ("lightx2v/Qwen-Image-Distill-8steps", "Distill"),
    ],
)
def test_names_of_few_step_releases(name: str, word: str) -> None:
    assert few_step_word(name) == word


@pytest.mark.parametrize(
    "name",
    [
        "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.2-klein-base-9B", "stabilityai/sdxl-base-1.0",
        "turbo/models/v1-5.safetensors", "lightning-owner/anime-xl", "me/hyperrealism-v3", "nyanko7/flux-de-distill",
        "me/flux-undistilled", "me/sd15-20000-steps", "Tongyi-MAI/Z-Image", "Qwen/Qwen-Image", "me/steps", "tiny", "",
    ],
)  # fmt: skip
def test_names_that_only_look_like_them(name: str) -> None:
    assert few_step_word(name) is None


def test_a_release_that_says_that_it_is_distilled_is_refused_before_and_while_its_weights_are_loaded(
    teacher_folder: Path, tmp_path: Path, check
) -> None:
    said = (
        r"is distilled to few steps already \(is_distilled in its model_index.json\); give the model that it was dist"
    )
    with pytest.raises(ValueError, match=said):
        check(named(teacher_folder, tmp_path / "bare", is_distilled=True))
    shutil.copytree(teacher_folder, tmp_path / "whole")
    index = json.loads((teacher_folder / INDEX).read_text())
    (tmp_path / "whole" / INDEX).write_text(json.dumps({**index, "is_distilled": True}))
    with pytest.raises(ValueError, match=said):
        load_teacher(str(tmp_path / "whole"), torch.float32)


def said_once(warnings: pytest.WarningsRecorder) -> str:
    """The one warning since the last call."""
    (warning,) = warnings.list
    warnings.clear()
    return str(warning.message)


def test_a_name_is_a_guess_and_the_warning_says_so_and_what_to_give(
    teacher_folder: Path, tmp_path: Path, check, recwarn: pytest.WarningsRecorder
) -> None:
    folder = named(teacher_folder, tmp_path / "my-sd-Lightning")
    check(folder)
    assert said_once(recwarn) == (
        f"{folder} seems to be distilled to few steps already, by 'Lightning' in its name. {WHAT_IT_MEANS} If it is, "
        "give the model that it was distilled from, for example stable-diffusion-v1-5/stable-diffusion-v1-5."
    )
    check(named(teacher_folder, tmp_path / "plain", _name_or_path="stabilityai/sd-turbo"))  # a fine-tune's origin
    assert "by 'turbo' in its name" in said_once(recwarn)
    check(named(teacher_folder, tmp_path / "klein-turbo", is_distilled=False))
    assert not recwarn.list


def test_configurations_of_few_step_releases_are_hints() -> None:
    flux, index = make_flux(guidance_embeds=False), {"_class_name": "FluxPipeline"}
    config = flux.transformer.config
    schnell = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=1.0)
    said = few_step_warning("mine", index, schnell, config) or ""
    assert "by its configuration, which is that of FLUX.1 schnell" in said and said.endswith("FLUX.1-dev.")
    dev = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    assert few_step_warning("mine", index, dev, config) is None  # schnell without its distillation
    assert few_step_warning("mine", index, dev, make_flux().transformer.config) is None
    assert "'Turbo'" in (few_step_warning("me/FLUX-Turbo/model.safetensors", index, dev, config) or "")
    assert few_step_warning("./FLUX-Turbo/model.safetensors", index, dev, config) is None
    sdxl, index = make_sdxl(), {"_class_name": "StableDiffusionXLPipeline"}
    for settings, hint in (
        ({"timestep_spacing": "trailing"}, True),
        ({"timestep_spacing": "leading"}, False),
        ({"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, False),
    ):
        scheduler = EulerDiscreteScheduler.from_config(sdxl.scheduler.config, **settings)
        said = few_step_warning("mine", index, scheduler, sdxl.unet.config)
        assert bool(said and "trailing, as of the turbo releases" in said) == hint


def test_a_lora_for_few_steps_is_warned_of_by_its_name_and_by_its_metadata(
    teacher_folder: Path, tmp_path: Path, check, recwarn: pytest.WarningsRecorder
) -> None:
    weights = load_file(write_lora(tmp_path / "lora", OWN) / LORA_FILE)
    for name, metadata in (("Hyper-SD15-8steps", {}), ("mine", {"ss_output_name": "anime_lcm"})):
        save_file(weights, tmp_path / f"{name}.safetensors", metadata)
        check(teacher_folder, teacher_lora=tmp_path / f"{name}.safetensors")
        said = said_once(recwarn)
        assert said.startswith("--teacher_lora ") and "seems to be for few steps" in said
        assert said.endswith("leave it out, or start the student from it with --init_lora.")
    check(teacher_folder, init_lora=tmp_path / "Hyper-SD15-8steps.safetensors", rank=3)
    check(teacher_folder, teacher_lora=tmp_path / "lora")
    assert not recwarn.list


def test_a_student_is_refused_as_its_teachers_lora(teacher_folder: Path, tmp_path: Path, check) -> None:
    folder = write_lora(tmp_path / "student", OWN)
    (folder / STUDENT_CONFIG).write_text("{}")
    save_file(
        load_file(folder / LORA_FILE), tmp_path / "comfyui.safetensors",
        {"modelspec.description": "A few-step student of a StableDiffusionPipeline, distilled with rdm_diffusers."},
    )  # fmt: skip
    for lora in (folder, tmp_path / "comfyui.safetensors"):
        with pytest.raises(ValueError, match="is a few-step student, with which a teacher is distilled already; leave"):
            check(teacher_folder, teacher_lora=lora)
