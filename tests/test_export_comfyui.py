"""The file for ComfyUI and kohya's tools: every key is read by diffusers and by both of them, and all adds up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import lora_base
from parts import PROMPTS
from parts_comfyui import assert_read, modules_of, paths_of, stability_modules
from parts_configs import TEACHERS
from parts_families import CALLS, MAKERS, make_pipeline
from parts_sd3 import make_shared
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rdm_diffusers.families import FAMILIES, LORA_FILE, PromptOptions, Teacher
from rdm_diffusers.hub import check_comfyui, comfyui_name, export_lora, has_comfyui, write_comfyui
from rdm_diffusers.hub.comfyui import as_comfyui
from rdm_diffusers.pipelines import RdmDistillationPipeline
from rdm_diffusers.training.assembly import make_scheduler

NAMES = [name for name in MAKERS if FAMILIES[name].has_lora and has_comfyui(name)]
every = pytest.mark.parametrize("name", NAMES)
# diffusers loads files with ComfyUI's own names of Lumina 2 at the published size only, and if they adapt all layers.
LOADED = [name for name in NAMES if FAMILIES[name].comfyui_keys != "joint"]
RANK, ALPHA, STEPS = 2, 5, 4


# --- tiny students of every family ---------------------------------------------------------------------------------
def make_teacher(name: str) -> Teacher:
    call = CALLS.get(name, {})
    options = PromptOptions(call.get("max_sequence_length"), call.get("height"), 3.5)
    return Teacher(make_pipeline(name), FAMILIES[name], name, options)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory):
    """The folder of a family's tiny LoRA student, exported once; rank and alpha differ."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            teacher = make_teacher(name)
            weights = make_shared(teacher, rank=RANK, alpha=ALPHA).student_weights()
            made[name] = tmp_path_factory.mktemp(name)
            export_lora(made[name], teacher, weights, make_scheduler(teacher, STEPS, eta=1.0))
        return made[name]

    return folder


def file_of(student: Path) -> Path:
    return student / "comfyui" / f"{student.name}.safetensors"


def adapted(denoiser: torch.nn.Module) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}


def draw(pipeline, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(6)
    return pipeline(prompt=list(PROMPTS[:2]), output_type="pt", **options).images


@every
def test_comfyui_and_kohya_read_every_key(name: str, students) -> None:
    assert_read(load_file(file_of(students(name))), name)


@pytest.mark.parametrize("name", LOADED)
def test_diffusers_reads_every_key_and_draws_the_same_pictures(name: str, students) -> None:
    folder, family = students(name), FAMILIES[name]
    student = RdmDistillationPipeline.from_pipe(make_pipeline(name), folder)
    stock = make_pipeline(name)
    stock.load_lora_weights(file_of(folder).parent, weight_name=file_of(folder).name)
    ours, theirs = adapted(family.denoiser(student)), adapted(family.denoiser(stock))
    assert ours.keys() == theirs.keys()
    for layer, other in zip(ours.values(), theirs.values(), strict=True):
        delta = other.get_delta_weight(other.active_adapters[0])
        assert (layer.get_delta_weight(layer.active_adapters[0]) - delta).abs().max() < 1e-6
        assert delta.abs().max() > 1e-3
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    stock.scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(folder, subfolder="scheduler")
    call = {"num_inference_steps": STEPS, **student.student.call_arguments}
    assert (draw(student) - draw(stock, **call)).abs().max() < 1e-4


def added_by_hand(network: torch.nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`W + alpha / rank * up @ down` for every module of the file; a missing alpha is the rank."""
    weights = dict(network.state_dict())
    paths = {f"lora_unet_{path.replace('.', '_')}": path for path, _ in network.named_modules()}
    if any("input_blocks" in key for key in tensors):
        paths = stability_modules(network)
    for module in modules_of(tensors):
        kohya = module in paths
        down, up = (tensors[f"{module}.lora_{m}.weight"] for m in (("down", "up") if kohya else ("A", "B")))
        scale = tensors[f"{module}.alpha"].item() / down.shape[0] if kohya else 1.0
        names = [f"{path}.weight" for path in ([paths[module]] if kohya else paths_of(module))]
        added = (scale * (up.flatten(1) @ down.flatten(1))).split([len(weights[name]) for name in names])
        for name, rows in zip(names, added, strict=True):
            weights[name] = weights[name] + rows.reshape(weights[name].shape)
    return weights


@every
def test_the_files_deltas_added_by_hand_make_the_students_network(name: str, students) -> None:
    folder, family = students(name), FAMILIES[name]
    tensors = load_file(file_of(folder))
    by_hand = added_by_hand(family.denoiser(make_pipeline(name)), tensors)
    student = family.denoiser(RdmDistillationPipeline.from_pipe(make_pipeline(name), folder))
    student.fuse_lora()
    student.unload_lora()
    fused = student.state_dict()
    assert fused.keys() == by_hand.keys()
    assert max((fused[key] - by_hand[key]).abs().max() for key in fused) < 1e-6
    kernels = {tuple(tensor.shape[2:]) for key, tensor in tensors.items() if "down" in key}
    assert ((3, 3) in kernels) == (family.denoiser_name == "unet")


# --- real sizes, on the meta device --------------------------------------------------------------------------------
def real_lora(teacher: str) -> tuple[str, torch.nn.Module, dict[str, Tensor]]:
    """The stock pipeline's name, the network, and what a student of it is exported with by default, without numbers."""
    name, parts, *_ = TEACHERS[teacher]
    family = FAMILIES[name]
    kind, settings = parts[family.denoiser_name]
    with torch.device("meta"):
        denoiser = kind(**settings)
        denoiser.add_adapter(
            LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(family.lora_target_modules)), "default"
        )
    layers = get_peft_model_state_dict(denoiser, adapter_name="default")
    return name, denoiser, {f"{family.denoiser_name}.{key}": tensor for key, tensor in layers.items()}


REAL = [teacher for teacher, (name, *_) in TEACHERS.items() if name in NAMES]


@pytest.mark.parametrize("teacher", REAL)
def test_the_default_modules_of_real_models_are_read(teacher: str) -> None:
    name, denoiser, weights = real_lora(teacher)
    keys = as_comfyui(weights, ALPHA, FAMILIES[name], denoiser.config).keys()
    assert_read(keys, name)
    paths = [path for module in modules_of(keys) for path in paths_of(module)]
    assert len(set(paths)) == len(paths) == len(adapted(denoiser)) >= 100


# Where ComfyUI's own network has one matrix for several of diffusers', a LoRA goes to rows of it: as many as the
# network is wide for queries, keys and values, and four times so for the other half in FLUX's single blocks.
ROWS = {r"(to_[qkv]|add_[qkv]_proj)": 1, r"single_transformer_blocks.*proj_mlp": 4}
WIDTHS = {
    "stabilityai/stable-diffusion-3.5-medium": 24 * 64,
    "stabilityai/stable-diffusion-3.5-large": 38 * 64,
    "black-forest-labs/FLUX.1-dev": 3072,
    "Tongyi-MAI/Z-Image": 3840,
    "black-forest-labs/FLUX.2-klein-base-4B": 3072,
    "black-forest-labs/FLUX.2-klein-base-9B": 4096,
}


@pytest.mark.parametrize("teacher", WIDTHS)
def test_what_goes_into_rows_of_a_joint_matrix_has_their_number(teacher: str) -> None:
    name, denoiser, weights = real_lora(teacher)
    seen = 0
    for key, tensor in as_comfyui(weights, ALPHA, FAMILIES[name], denoiser.config).items():
        for pattern, share in ROWS.items():
            if re.search(rf"{pattern}\.lora_B\.weight$", key):
                assert tensor.shape[0] == share * WIDTHS[teacher], key
                seen += 1
    assert seen >= 6 * 5


def test_diffusers_own_conversion_of_lumina_2s_names_gives_the_same_lora() -> None:
    family, rank = FAMILIES["Lumina2Pipeline"], RANK
    kind, settings = TEACHERS["Alpha-VLLM/Lumina-Image-2.0"][1]["transformer"]
    with torch.device("meta"):
        denoiser = kind(**{**settings, "num_layers": 1, "num_refiner_layers": 1})
    denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(family.lora_target_modules)))
    layers = get_peft_model_state_dict(denoiser, adapter_name="default")
    weights = {f"transformer.{key}": torch.randn(tensor.shape) for key, tensor in layers.items()}
    tensors = as_comfyui(weights, ALPHA, family, denoiser.config)
    for block in ("layers", "noise_refiner"):  # diffusers wants every layer
        for matrix, shape in (("A", (rank, 4)), ("B", (4, rank))):
            tensors[f"diffusion_model.{block}.0.adaLN_modulation.1.lora_{matrix}.weight"] = torch.zeros(shape)
    read = diffusers.Lumina2Pipeline.lora_state_dict(tensors)
    paths = {key.rpartition(".lora_")[0] for key in weights}
    assert paths == {key.rpartition(".lora_")[0] for key in read if "norm1" not in key} and len(paths) == 3 * 7
    for path in paths:
        (down, up), (own_down, own_up) = (
            (each[f"{path}.lora_A.weight"], each[f"{path}.lora_B.weight"]) for each in (read, weights)
        )
        assert torch.allclose(up @ down, ALPHA / rank * own_up @ own_down, atol=1e-3)


# --- the file ------------------------------------------------------------------------------------------------------
def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_header_tells_tools_what_the_file_is(students) -> None:
    folder = students("StableDiffusionXLPipeline")
    header = header_of(file_of(folder))
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.title"] == header["ss_output_name"] == folder.name
    assert header["modelspec.usage_hint"] == "4 steps, CFG 1, sampler lcm"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "5.0")
    assert header["ss_base_model_version"].startswith("sdxl_")
    assert header_of(file_of(students("FluxPipeline")))["ss_network_alpha"] == "2.0"
    assert "embedded guidance 3.5" in header_of(file_of(students("FluxPipeline")))["modelspec.usage_hint"]


@every
def test_the_header_holds_no_path(name: str, students) -> None:
    assert not any("/" in value.removesuffix("/lora") for value in header_of(file_of(students(name))).values())


@pytest.mark.parametrize(
    ("width", "prediction_type", "architecture"),
    [(768, "epsilon", "v1"), (1024, "epsilon", "v2-512"), (1024, "v_prediction", "v2-768-v"), (None, "epsilon", "v1")],
)
def test_stable_diffusion_2_is_told_from_1(width: int | None, prediction_type: str, architecture: str) -> None:
    family = FAMILIES["StableDiffusionPipeline"]
    assert family.architecture(width, prediction_type) == f"stable-diffusion-{architecture}"


def test_weights_are_written_in_another_precision_and_alphas_in_their_own(students, tmp_path: Path) -> None:
    write_comfyui(
        students("StableDiffusionPipeline"), tmp_path / "x.safetensors", "StableDiffusionPipeline", torch.half
    )
    tensors = load_file(tmp_path / "x.safetensors")
    alphas = {key: tensor for key, tensor in tensors.items() if key.endswith("alpha")}
    assert {tensor.dtype for key, tensor in tensors.items() if key not in alphas} == {torch.half}
    assert {(tensor.dtype, tensor.item()) for tensor in alphas.values()} == {(torch.float32, ALPHA)}


@pytest.mark.parametrize("name", ["SanaPipeline", "PixArtSigmaPipeline"])
def test_families_that_comfyui_reads_no_loras_of_are_refused(name: str, students) -> None:
    with pytest.raises(ValueError, match=f"ComfyUI reads no LoRAs of students of {name}; export them with --format"):
        check_comfyui(name)


def test_a_student_without_such_a_format_is_exported_without_it(students) -> None:
    assert not (students("SanaPipeline") / "comfyui").exists()


def test_stock_diffusers_finds_its_own_file_in_the_folder_and_on_the_hub(students, monkeypatch) -> None:
    folder = students("StableDiffusionPipeline")
    assert lora_base._best_guess_weight_name(folder) == LORA_FILE

    class Listing:
        siblings = [
            type("File", (), {"rfilename": str(path.relative_to(folder))}) for path in sorted(folder.rglob("*.*"))
        ]

    monkeypatch.setattr(lora_base, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(lora_base, "model_info", lambda name: Listing)
    assert len(Listing.siblings) == 4
    assert lora_base._best_guess_weight_name("me/student") == LORA_FILE


def test_a_file_is_never_called_as_diffusers_own(tmp_path: Path) -> None:
    assert comfyui_name(tmp_path / "sd15-4step") == "sd15-4step.safetensors"
    assert comfyui_name(tmp_path / "my_pytorch_lora_weights") == "my_pytorch_lora_weights-comfyui.safetensors"


@pytest.mark.parametrize("eta", [1.0, 0.0])
@pytest.mark.parametrize("steps", range(1, 9))
def test_comfyuis_simple_scheduler_lays_the_trained_grid(steps: int, eta: float) -> None:
    # comfy/samplers.py: of 1,000 sigmas in ascending order the one at -(1 + int(i * 1000 / steps)).
    simple = [999 - int(i * 1000 / steps) for i in range(steps)]
    tolerance = 0 if 1000 % steps == 0 else 6
    for name in ("StableDiffusionPipeline", "StableDiffusion3Pipeline"):
        stock = FAMILIES[name].stock_scheduler(diffusers.DDIMScheduler(), steps, eta)
        stock.set_timesteps(steps)
        # Those of flow matching are at sigmas of (index + 1) / 1000, without the teacher's shift.
        grid = [1000 * sigma - 1 for sigma in stock.sigmas[:-1].tolist()] if "3" in name else stock.timesteps.tolist()
        assert max(abs(ours - theirs) for ours, theirs in zip(grid, simple, strict=True)) <= tolerance + 1e-3
