"""Stability's names in SDXL's files for ComfyUI and kohya's tools: every module has its own, and diffusers reads it."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import constants
from parts_comfyui import Original, modules_of, stability_modules
from parts_configs import SDXL_UNET
from parts_families import make_sdxl
from parts_sd3 import make_shared
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rdm_diffusers.families import FAMILIES, PromptOptions, Teacher
from rdm_diffusers.hub import comfyui_name, export_lora, write_card, write_comfyui
from rdm_diffusers.hub.comfyui import as_comfyui, comfyui_node, stability_names
from rdm_diffusers.pipelines import StudentConfig
from rdm_diffusers.training.assembly import make_scheduler

NAME = "StableDiffusionXLPipeline"
FAMILY = FAMILIES[NAME]
OUTSIDE = [
    "conv_in",
    "conv_out",
    "linear_1",
    "linear_2",
]  # of the blocks; no default of a LoRA
RANK, ALPHA = 2, 5.0
ZERO_SNR: dict[str, Any] = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
SMALL = {**SDXL_UNET, "block_out_channels": (32, 64, 64), "attention_head_dim": 8, "cross_attention_dim": 16}
CROSS = dict(down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2)
LAYOUTS: dict[str, dict[str, Any]] = {
    "SDXL": SDXL_UNET,
    "deeper attentions on the way up, none in the middle": {
        **SMALL, "transformer_layers_per_block": (1, 2, 4), "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "one layer a block, no middle": {**SMALL, "layers_per_block": 1, "mid_block_type": None},
    "two blocks of four layers": {
        **SMALL, **CROSS, "block_out_channels": (32, 64), "layers_per_block": 4, "transformer_layers_per_block": 1,
    },
}  # fmt: skip
FOUR = {
    "block_out_channels": (32, 32, 64, 64), "transformer_layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",) * 4,
}  # fmt: skip
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "four blocks": ({**SMALL, **FOUR}, "it has 4 blocks of 2 layers, more than such names can distinguish"),
    "a list": ({**SMALL, "layers_per_block": (2, 1, 2)}, "its layers_per_block are (2, 1, 2), not one number"),
    "a bare upsampling": (
        {**SMALL, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")},
        "it has an upsampling after a block without attention",
    ),
    "another kind": (
        {**SMALL, "down_block_types": ("ResnetDownsampleBlock2D", *SMALL["down_block_types"][1:])},
        "it has blocks of another kind, ResnetDownsampleBlock2D",
    ),
}


def on_meta(config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def lora_of(config: dict[str, Any], *more: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A U-Net on the meta device with a LoRA on its default modules and others, and the LoRA's weights."""
    unet = on_meta(config)
    with torch.device("meta"):
        unet.add_adapter(LoraConfig(r=RANK, target_modules=[*FAMILY.lora_target_modules, *more]), "default")
    layers = get_peft_model_state_dict(unet, adapter_name="default")
    return unet, {f"unet.{key}": tensor for key, tensor in layers.items()}


def read_by_diffusers(tensors: dict[str, Tensor], unet: nn.Module) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A file's weights and alphas as diffusers' loader hands them to peft."""
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(tensors), unet_config=unet.config)
    return convert_unet_state_dict_to_peft(state), alphas


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_module_has_the_name_that_a_walk_through_the_network_gives_it(layout: str) -> None:
    unet, weights = lora_of(LAYOUTS[layout], *OUTSIDE)
    tensors = as_comfyui(weights, ALPHA, FAMILY, unet.config)
    adapted = {name for name, layer in unet.named_modules() if isinstance(layer, LoraLayer)}
    named = stability_modules(on_meta(LAYOUTS[layout]))
    expected = {module: path for module, path in named.items() if path in adapted}
    assert modules_of(tensors).keys() == expected.keys()
    assert set(expected.values()) == adapted
    for module, path in expected.items():
        assert tensors[f"{module}.lora_down.weight"] is weights[f"unet.{path}.lora_A.weight"]
        assert tensors[f"{module}.lora_up.weight"] is weights[f"unet.{path}.lora_B.weight"]
        assert tensors[f"{module}.alpha"].item() == ALPHA


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_finds_every_module_by_its_name(layout: str) -> None:
    unet, weights = lora_of(LAYOUTS[layout], *OUTSIDE)
    state, alphas = read_by_diffusers(as_comfyui(weights, ALPHA, FAMILY, unet.config), unet)
    assert state.keys() == weights.keys()
    assert all(state[name] is tensor for name, tensor in weights.items())
    assert len(alphas) == len(weights) // 2 and set(alphas.values()) == {ALPHA}


# --- SDXL's original network ---------------------------------------------------------------------------------------
def test_the_default_modules_are_all_of_sdxls_original_network_each_of_its_shape() -> None:
    unet, weights = lora_of(SDXL_UNET)
    tensors = as_comfyui(weights, ALPHA, FAMILY, unet.config)
    shapes = {
        module.removeprefix("lora_unet_"): (
            len(tensors[f"{module}.lora_up.weight"]), *tensors[f"{module}.lora_down.weight"].shape[1:],
        )
        for module in modules_of(tensors)
    }  # fmt: skip
    assert shapes == Original().shapes
    assert len(shapes) == 788


# --- U-Nets that are laid out otherwise ----------------------------------------------------------------------------
@pytest.mark.parametrize("layout", OTHERS)
def test_other_layouts_keep_diffusers_names_with_a_reason(layout: str, caplog: pytest.LogCaptureFixture) -> None:
    config, reason = OTHERS[layout]
    unet, weights = lora_of(config)
    with caplog.at_level(logging.WARNING):
        tensors = as_comfyui(weights, ALPHA, FAMILY, unet.config)
    assert caplog.text.count("keeps diffusers' block names") == 1
    assert f"not laid out as Stability's: {reason}" in caplog.text
    assert not any(part in key for key in tensors for part in ("input_blocks", "output_blocks", "middle_block"))
    assert read_by_diffusers(tensors, unet)[0].keys() == weights.keys()


@pytest.mark.parametrize(
    ("path", "config", "reason"),
    [
        ("encoder_hid_proj", SMALL, "its encoder_hid_proj has no such name"),
        ("down_blocks.3.resnets.0.conv1", SMALL, "its down_blocks.3.resnets.0.conv1 has no such name"),
        ("conv_in", {}, "its configuration names no blocks"),
        ("conv_in", {**SMALL, "up_block_types": "UpBlock2D"}, "its configuration names no blocks"),
        ("conv_in", {**SMALL, "layers_per_block": None}, "its layers_per_block are None, not one number"),
        ("conv_in", {**SMALL, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "blocks of another kind, UNetMid"),
    ],
)
def test_what_has_no_such_name_is_refused(path: str, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        stability_names([path], {"layers_per_block": 2, **config})


# --- files ---------------------------------------------------------------------------------------------------------
def export(folder: Path, base: Path, *more: str, **scheduler: Any) -> Path:
    """A tiny SDXL student in a folder, with a LoRA on more modules than by default; its base model is a folder, too."""
    teacher = Teacher(make_sdxl(**scheduler), FAMILY, str(base), PromptOptions())
    teacher.pipeline.save_pretrained(base)
    folder.mkdir()
    weights = make_shared(teacher, rank=RANK, alpha=5, more_layers=more).student_weights()
    export_lora(folder, teacher, weights, make_scheduler(teacher, 4, eta=1.0))
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    return export(folder / "student", folder / "base", *OUTSIDE)


def deltas(unet: nn.Module) -> dict[str, Tensor]:
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, LoraLayer)}
    return {name: layer.get_delta_weight(layer.active_adapters[0]) for name, layer in layers.items()}


def test_diffusers_loads_the_file_as_it_loads_its_own_to_the_last_bit(student: Path) -> None:
    own, other = make_sdxl(), make_sdxl()
    own.load_lora_weights(student, weight_name="pytorch_lora_weights.safetensors")
    other.load_lora_weights(student / "comfyui", weight_name=comfyui_name(student))
    expected, found = deltas(own.unet), deltas(other.unet)
    assert {"conv_in", "conv_out", "time_embedding.linear_2", "add_embedding.linear_1"} < found.keys()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], delta) for name, delta in expected.items())
    assert min(delta.abs().max() for delta in found.values()) > 0


def test_a_students_file_is_written_again_with_the_layout_of_its_base_model(student: Path, tmp_path: Path) -> None:
    write_comfyui(student, tmp_path / "again.safetensors", NAME)
    written, first = load_file(tmp_path / "again.safetensors"), load_file(student / "comfyui" / comfyui_name(student))
    assert written.keys() == first.keys()
    assert any("input_blocks" in key for key in written)
    assert all(torch.equal(written[key], tensor) for key, tensor in first.items())


def test_the_layout_of_a_base_model_of_the_hub_comes_from_its_revision_and_the_cache(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shutil.copytree(student, tmp_path / "student")
    replace(StudentConfig.load(str(student)), base_model_name_or_path="me/base", revision="v1").save(
        tmp_path / "student"
    )
    with pytest.raises(ValueError, match="The teacher 'me/base' is neither a local folder nor in the cache"):
        write_comfyui(tmp_path / "student", tmp_path / "x.safetensors", NAME)
    repository = tmp_path / "cache" / "models--me--base"
    shutil.copytree(student.parent / "base", repository / "snapshots" / "abc", ignore=lambda *_: ["vae", "tokenizer"])
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("abc")
    write_comfyui(tmp_path / "student", tmp_path / "x.safetensors", NAME)
    assert load_file(tmp_path / "x.safetensors").keys() == load_file(student / "comfyui" / comfyui_name(student)).keys()


@pytest.mark.parametrize("content", [None, "", "[1]", "7", '{"a": '])
def test_without_its_base_models_configuration_the_file_is_refused(tmp_path: Path, content: str | None) -> None:
    folder = export(tmp_path / "student", tmp_path / "base")
    config = tmp_path / "base" / "unet" / "config.json"
    config.unlink()
    if content is not None:
        config.write_text(content)
    with pytest.raises(ValueError, match=r"unet/config.json is damaged \(.*\); save or download the base model"):
        write_comfyui(folder, tmp_path / "x.safetensors", NAME)
    assert not (tmp_path / "x.safetensors").exists()


# --- how it is sampled ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", NAME])
@pytest.mark.parametrize(
    ("scheduler", "node"),
    [
        ({}, None),
        ({"prediction_type": "epsilon"}, None),
        ({"prediction_type": "v_prediction"}, "*ModelSamplingDiscrete* with v_prediction and zsnr off"),
        (ZERO_SNR, "*ModelSamplingDiscrete* with v_prediction and zsnr on"),
        ({"prediction_type": "sample"}, "*ModelSamplingDiscrete* with x0 and zsnr off"),
    ],
)
def test_the_node_of_a_students_prediction_is_named(name: str, scheduler: dict[str, Any], node: str | None) -> None:
    assert comfyui_node(StudentConfig(None, name, {"eta": 1.0, **scheduler}, 4)) == node


def test_students_of_flow_matching_keep_the_node_that_takes_the_shift_out() -> None:
    student = StudentConfig(None, "FluxPipeline", {"eta": 1.0, "prediction_type": "flow_prediction"}, 4)
    assert comfyui_node(student) == "*ModelSamplingFlux* with both shifts 0"


def test_card_and_header_of_a_zero_snr_student_name_the_node(tmp_path: Path) -> None:
    folder = export(tmp_path / "student", tmp_path / "base", **ZERO_SNR)
    card = write_card(folder).read_text()
    assert "at strength 1.0, add *ModelSamplingDiscrete* with v_prediction and zsnr on, and\nset KSampler" in card
    with safe_open(folder / "comfyui" / comfyui_name(folder), "pt") as file:
        hint = file.metadata()["modelspec.usage_hint"]
    assert hint == "4 steps, CFG 1, sampler lcm, ModelSamplingDiscrete with v_prediction and zsnr on"
