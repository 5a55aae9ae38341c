"""What is in a single file: networks that it lacks come from elsewhere, and what cannot be a teacher is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from parts import make_pipeline, make_unet, run_arguments
from parts_configs import write_configs
from parts_families import make_pipeline as make_family
from parts_loras import OWN, write_lora
from parts_single_file import (
    DENOISER,
    original,
    original_clip,
    original_flux,
    original_sd3,
    original_unet,
    original_vae,
    original_z_image,
    write_file,
)
from safetensors.torch import load_file
from test_single_file import assert_same, weights_of

from rdm_diffusers.config import RunConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.families import LORA_FILE, QUANTIZATIONS, SingleFile, is_single_file, load_teacher
from rdm_diffusers.families.single_file import default_config
from rdm_diffusers.families.single_file_parts import network_problem
from rdm_diffusers.training.teacher_checks import check_with_teacher


@pytest.fixture(scope="module")
def bare(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's configuration without weights."""
    folder = tmp_path_factory.mktemp("configuration") / "bare"
    return Path(shutil.copytree(teacher_folder, folder, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture
def complaint(bare: Path, prompts_file: Path, tmp_path: Path):
    """What a run says of a file as its teacher, in one line, before anything is loaded."""

    def run(file: Path | str, **changes) -> str:
        flags = {"single_file_config": bare, **changes}
        with pytest.raises(ValueError) as caught:
            check_with_teacher(parse_args(run_arguments(file, prompts_file, tmp_path / "run", **flags)))
        said = str(caught.value)
        assert "\n" not in said and said.endswith(".")
        return said.replace(str(file), "FILE").replace(str(bare), "CONFIG")

    return run


@pytest.mark.parametrize("name", ["FluxPipeline", "ZImagePipeline", "QwenImagePipeline"])
def test_a_file_of_the_transformer_alone_gets_the_other_networks_from_the_given_pipeline(
    name: str, tmp_path: Path
) -> None:
    pipeline = make_family(name)
    pipeline.save_pretrained(tmp_path / "folder")
    whole = load_teacher(str(tmp_path / "folder"), torch.float32)
    with torch.no_grad():
        for parameter in whole.denoiser.parameters():
            parameter.mul_(1.5)
    own = original_z_image(whole.denoiser) if name == "ZImagePipeline" else whole.denoiser.state_dict()
    file = str(write_file(tmp_path / "transformer.safetensors", own))
    teacher = load_teacher(file, torch.float32, single_file_config=str(tmp_path / "folder"))
    assert_same(teacher, whole)
    assert teacher.file_parts == ["transformer"]


def test_a_whole_file_of_stable_diffusion_3_is_its_teacher_bit_for_bit(tmp_path: Path) -> None:
    pipeline = make_family("StableDiffusion3Pipeline")
    with torch.no_grad():  # such files lack this projection, which diffusers takes to be the identity
        pipeline.text_encoder.text_projection.weight.copy_(torch.eye(16))
    pipeline.save_pretrained(tmp_path / "folder")
    own = original_sd3(pipeline.transformer) | original_vae(pipeline.vae)
    own |= original_clip(pipeline.text_encoder, "text_encoders.clip_l.transformer.")
    del own["text_encoders.clip_l.transformer.text_model.text_projection.weight"]
    own |= {
        f"text_encoders.clip_g.transformer.{key}": each for key, each in pipeline.text_encoder_2.state_dict().items()
    }
    file = str(write_file(tmp_path / "model.safetensors", own))
    teacher = load_teacher(file, torch.float32, single_file_config=str(tmp_path / "folder"))
    assert_same(teacher, load_teacher(str(tmp_path / "folder"), torch.float32))
    assert teacher.file_parts == ["transformer", "text_encoder", "text_encoder_2", "vae"]


def test_a_whole_transformer_of_flux_fits_its_configuration_by_the_header_alone(tmp_path: Path) -> None:
    folder = write_configs("black-forest-labs/FLUX.1-dev", tmp_path / "flux")
    with torch.device("meta"):
        kind = FluxTransformer2DModel
        weights = original_flux(kind.from_config(kind.load_config(folder, subfolder="transformer")))
    assert default_config("flux.safetensors", weights) == "black-forest-labs/FLUX.1-dev"
    assert network_problem(kind, "transformer", weights, folder) is None
    guidance = {name: tensor for name, tensor in weights.items() if "guidance" in name}
    plain = {name: tensor for name, tensor in weights.items() if name not in guidance}
    assert (network_problem(kind, "transformer", plain, folder) or "").startswith(
        "lacks time_text_embed.guidance_embedder"
    )
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "guidance_embeds": False}))
    said = network_problem(kind, "transformer", weights, folder) or ""
    assert said.startswith("has tensors that the configuration does not have, time_text_embed.guidance_embedder")


@pytest.mark.parametrize(
    "name", ["stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"]
)
def test_networks_of_real_sizes_fit_their_configurations_by_the_header_alone(name: str, tmp_path: Path) -> None:
    folder, weights = write_configs(name, tmp_path / "folder"), {}
    with torch.device("meta"):
        for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            network = kind.from_config(kind.load_config(folder, subfolder=part))
            network.save_config(folder / part)  # with the defaults, which diffusers' conversions read
            weights |= original_unet(network) if part == "unet" else original_vae(network)
    for part, kind, mark in (("unet", UNet2DConditionModel, "middle_block.1."), ("vae", AutoencoderKL, "mid.attn_1.q")):
        assert network_problem(kind, part, weights, folder) is None
        lost = next(key for key in weights if mark in key)
        less = {key: tensor for key, tensor in weights.items() if key != lost}
        assert "lacks " in (network_problem(kind, part, less, folder) or "")


def test_a_file_in_half_precision_is_loaded_in_the_dtype_that_is_asked_for(
    teacher_folder: Path, bare: Path, tmp_path: Path
) -> None:
    weights = {name: tensor.half() for name, tensor in original(make_pipeline()).items()}
    file = str(write_file(tmp_path / "half.safetensors", weights))
    teacher = load_teacher(file, torch.float32, single_file_config=str(bare))
    exact = weights_of(load_teacher(str(teacher_folder), torch.float32))
    assert all(torch.equal(tensor, exact[name].half().float()) for name, tensor in weights_of(teacher).items())


def test_the_autoencoder_that_is_asked_for_replaces_the_files(bare: Path, tmp_path: Path) -> None:
    other = make_pipeline(seed=4).vae
    other.save_pretrained(tmp_path / "vae")
    file = str(write_file(tmp_path / "model.safetensors", original(make_pipeline())))
    teacher = load_teacher(file, torch.float32, single_file_config=str(bare), vae=str(tmp_path / "vae"))
    assert all(torch.equal(a, b) for a, b in zip(teacher.pipeline.vae.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantised_base_from_a_file_is_that_of_the_folder(
    kind: str, teacher_folder: Path, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(QUANTIZATIONS[kind])
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *args, **kwargs: None)
    monkeypatch.setattr("rdm_diffusers.families.quantization.NEEDS_GPU", ())
    if kind == "nf4":  # on a processor, as in test_quantization.py
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    file = str(write_file(tmp_path / "model.safetensors", original(make_pipeline())))
    options = {"dtype": torch.bfloat16, "quantization": kind}
    ours = load_teacher(file, single_file_config=str(bare), **options).denoiser
    theirs = load_teacher(str(teacher_folder), **options).denoiser
    call = (torch.randn(2, 4, 8, 8).bfloat16(), torch.tensor([20, 900]), torch.randn(2, 5, 16).bfloat16())
    with torch.no_grad():
        drawn, expected = (each(*call, return_dict=False)[0] for each in (ours, theirs))
    assert torch.equal(drawn, expected)
    plain = load_teacher(str(teacher_folder), torch.bfloat16).denoiser
    with torch.no_grad():
        assert not torch.equal(drawn, plain(*call, return_dict=False)[0])
    assert ours.hf_quantizer is not None


def test_files_that_are_not_whole_are_refused_by_their_headers(complaint, tmp_path: Path) -> None:
    weights = original(make_pipeline())

    def said(**changed) -> str:
        kept = {**weights, **changed}
        return complaint(write_file(tmp_path / "m.safetensors", {k: v for k, v in kept.items() if v is not None}))

    end = "; give the folder or Hub id of a pipeline of the same kind with --single_file_config, or download the file "
    end += "again."
    fits = "FILE does not fit the configuration of CONFIG: its "
    assert said(**{f"{DENOISER}out.2.bias": None}) == f"{fits}unet lacks conv_out.bias{end}"
    assert said(**{f"{DENOISER}out.2.bias": torch.ones(5)}) == f"{fits}unet has other shapes, in conv_out.bias{end}"
    assert said(**{"first_stage_model.encoder.conv_in.bias": None}) == f"{fits}vae lacks encoder.conv_in.bias{end}"
    norm = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    assert said(**{norm: None}) == f"{fits}text_encoder lacks final_layer_norm.bias{end}"
    assert said(**{norm: torch.ones(3)}).startswith(f"{fits}text_encoder does not fit (Cannot load")
    assert "its unet is not in the file" in said(**dict.fromkeys(original_unet(make_unet(width=16))))


def test_files_that_are_no_teachers_are_refused(complaint, teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    assert complaint(tmp_path / "cut.safetensors").startswith("FILE is damaged, or no safetensors file (")
    whole = write_file(tmp_path / "whole.safetensors", original(make_pipeline()))
    (tmp_path / "shorter.safetensors").write_bytes(whole.read_bytes()[:-100])
    assert complaint(tmp_path / "shorter.safetensors").startswith("FILE is damaged, or no safetensors file (")
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    pickled = "FILE holds pickled weights, which can run code and are refused; give a safetensors file."
    assert complaint(tmp_path / "model.ckpt") == complaint("nowhere/model.pt") == pickled
    lora = write_lora(tmp_path / "lora", OWN) / LORA_FILE
    assert complaint(lora).startswith(
        "FILE is a LoRA, not a teacher; give its base model, and the LoRA with --teacher_lor"
    )
    scaled = {**load_file(whole), f"{DENOISER}out.2.scale_weight": torch.ones(1)}
    assert complaint(write_file(tmp_path / "fp8.safetensors", scaled)).startswith(
        "FILE holds quantised weights (model.d"
    )
    assert complaint("gone.safetensors").startswith(
        "The teacher's file FILE does not exist; check the path, or give a f"
    )
    assert complaint("./a/b/gone.safetensors").startswith("The teacher's file FILE does not exist; check the path")
    with pytest.raises(
        ValueError, match=r"--single_file_config would have no effect, because .* is no single file; leave"
    ):
        RunConfig.of(pretrained_model_name_or_path=str(teacher_folder), single_file_config="me/sd")
    assert "is a file; give the folder that a diffusers pipeline was saved in" in complaint(
        whole, single_file_config=whole
    )


def test_a_pipeline_that_lacks_what_the_file_lacks_is_refused(bare: Path, tmp_path: Path) -> None:
    weights = original_unet(make_pipeline().unet) | original_vae(make_pipeline().vae)
    file = str(write_file(tmp_path / "no-text.safetensors", weights))
    with pytest.raises(ValueError, match=f"The teacher {bare} has no weights of its text_encoder; save or download"):
        load_teacher(file, torch.float32, single_file_config=str(bare))


def test_a_configuration_of_another_kind_is_refused(complaint, tmp_path: Path) -> None:
    make_family("StableDiffusionXLPipeline").save_pretrained(tmp_path / "xl")
    file = write_file(tmp_path / "model.safetensors", original(make_pipeline()))
    said = complaint(file, single_file_config=tmp_path / "xl")
    assert re.match(r"FILE does not fit the configuration of .*/xl: its unet (is not among its keys|lacks)", said)
    flux = make_family("FluxPipeline")
    flux.save_pretrained(tmp_path / "flux")
    said = complaint(
        write_file(tmp_path / "vae.safetensors", flux.vae.state_dict()), single_file_config=tmp_path / "flux"
    )
    assert "its transformer is not among its keys, or not whole, as far as a FluxTransformer2DModel has them" in said


def test_a_mark_of_v_prediction_must_agree_with_the_scheduler(complaint, bare: Path, tmp_path: Path) -> None:
    weights = original(make_pipeline())
    for file in (
        write_file(tmp_path / "key.safetensors", {**weights, "v_pred": torch.ones(0)}),
        write_file(tmp_path / "header.safetensors", weights, {"modelspec.prediction_type": "v"}),
    ):
        assert complaint(file).startswith(
            "FILE is marked as predicting v, and the scheduler of CONFIG is set for epsilon;"
        )
        folder = Path(shutil.copytree(bare, tmp_path / file.stem))
        settings = folder / "scheduler" / "scheduler_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "prediction_type": "v_prediction"}))
        assert load_teacher(str(file), torch.float32, single_file_config=str(folder)).prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("key", "shape", "config"),
    [
        ("model.diffusion_model.output_blocks.11.0.skip_connection.weight", (320, 640, 1, 1),
         "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias", (1280,),
         "stabilityai/stable-diffusion-xl-base-1.0"),
        ("model.diffusion_model.joint_blocks.37.x_block.mlp.fc1.weight", (9728, 2432),
         "stabilityai/stable-diffusion-3.5-large"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", (128,), "black-forest-labs/FLUX.1-schnell"),
    ],
)  # fmt: skip
def test_the_keys_of_a_file_tell_its_configuration(key: str, shape: tuple, config: str) -> None:
    assert default_config("model.safetensors", {key: torch.empty(shape, device="meta")}) == config


@pytest.mark.parametrize(
    ("key", "shape", "seen"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", (8, 4, 3, 3), r"\(keys\)|needs; give"),
        ("model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight", (320, 1024), "may be a v2"),
        ("model.diffusion_model.layers.0.adaLN_modulation.0.weight", (1, 1), "may be a z-image-turbo"),
    ],
)
def test_a_kind_that_keys_do_not_tell_needs_its_configuration(key: str, shape: tuple, seen: str) -> None:
    with pytest.raises(ValueError, match=seen) as caught:
        default_config("model.safetensors", {key: torch.empty(shape, device="meta")})
    assert "of a diffusers pipeline of the same kind with --single_file_config." in str(caught.value)


def test_names_of_folders_and_repositories_are_not_taken_for_files(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for name in (
        "tiny",
        "owner/model",
        "black-forest-labs/FLUX.1-dev",
        str(tmp_path),
        str(tmp_path / "folder.safetensors"),
    ):
        assert not is_single_file(name) and SingleFile.of(name) is None


def test_a_configuration_that_cannot_be_read_is_named_with_what_to_give(complaint, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = complaint(
        write_file(tmp_path / "m.safetensors", original(make_pipeline())), single_file_config="me/not-cached"
    )
    assert said.startswith(
        "The single file FILE needs the configuration of a pipeline of its kind, and me/not-cached was"
    )
    assert said.endswith("Another is given with --single_file_config.")


def test_a_few_step_file_is_warned_of_by_its_name(bare: Path, prompts_file: Path, tmp_path: Path) -> None:
    file = write_file(tmp_path / "animeXL_v2Lightning.safetensors", original(make_pipeline()))
    with pytest.warns(UserWarning, match="by 'Lightning' in its name"):
        check_with_teacher(parse_args(run_arguments(file, prompts_file, tmp_path / "run", single_file_config=bare)))
