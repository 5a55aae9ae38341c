"""Models that cannot be teachers are refused in one sentence; another autoencoder is taken; students on other bases."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from parts import PROMPTS, run_arguments
from parts_families import make_pipeline, make_sdxl, make_vae
from torch import Tensor

import train_rdm_lora
from rdm_diffusers.config import RunConfig
from rdm_diffusers.families import FAMILIES, load_teacher
from rdm_diffusers.pipelines import RdmDistillationPipeline, RdmStableDiffusionXLPipeline
from rdm_diffusers.training.teacher_checks import check_with_teacher


def refusal(pipeline, folder: Path) -> str:
    """What is said of a pipeline, saved into `folder`, as a teacher."""
    pipeline.save_pretrained(folder)
    with pytest.raises(ValueError) as caught:
        load_teacher(str(folder), torch.float32)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "TEACHER")


def draw(pipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="pt").images


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, prompts_file: Path) -> Path:
    """A LoRA student of a Stable Diffusion XL teacher that lies beside it, with another autoencoder."""
    folder = tmp_path_factory.mktemp("student")
    make_pipeline("StableDiffusionXLPipeline").save_pretrained(folder / "teacher")
    torch.manual_seed(7)
    make_vae(scaling_factor=0.9).save_pretrained(folder / "vae")
    arguments = run_arguments(folder / "teacher", prompts_file, folder / "lora", train_batch_size=4)
    train_rdm_lora.main([*arguments, "--pretrained_vae_model_name_or_path", str(folder / "vae")])
    return folder / "lora"


def test_epsilon_prediction_with_zero_terminal_snr(tmp_path: Path) -> None:
    assert refusal(make_sdxl(rescale_betas_zero_snr=True), tmp_path) == (
        "TEACHER predicts epsilon with zero terminal SNR, which leaves its first step undefined; set "
        "rescale_betas_zero_snr to false in its scheduler_config.json, or give a v-prediction model."
    )


def test_v_prediction_with_zero_terminal_snr_is_taken(tmp_path: Path) -> None:
    make_sdxl("v_prediction", rescale_betas_zero_snr=True).save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path), torch.float32).prediction_type == "v_prediction"


def test_a_model_with_its_own_times_of_sampling(tmp_path: Path) -> None:
    pipeline = make_pipeline("QwenImage21Pipeline")
    pipeline.register_to_config(sample_sigmas=[1.0, 0.9, 0.6])
    said = refusal(pipeline, tmp_path)
    assert said.startswith("TEACHER names its own times of sampling (sample_sigmas in model_index.json)")
    with pytest.raises(ValueError, match="names its own times of sampling"):
        check_with_teacher(RunConfig.of(pretrained_model=str(tmp_path)))


def test_a_model_that_says_that_it_is_distilled(tmp_path: Path) -> None:
    pipeline = make_pipeline("Krea2Pipeline")
    pipeline.register_to_config(is_distilled=True)
    assert refusal(pipeline, tmp_path) == (
        "TEACHER is distilled to few steps already (is_distilled in its model_index.json); give the model that it was "
        "distilled from, for example krea/Krea-2-Raw."
    )


def test_an_inpainting_model(tmp_path: Path) -> None:
    pipeline = make_sdxl()
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, in_channels=9)
    assert refusal(pipeline, tmp_path) == (
        "TEACHER has a U-Net of 9 input channels, as inpainting models do; give a text-to-image model."
    )


def test_models_that_are_distilled_already(tmp_path: Path) -> None:
    said = (
        "TEACHER is distilled to few steps already ({}); give the model that it was distilled from, for example "
        "stabilityai/stable-diffusion-xl-base-1.0."
    )
    pipeline = make_sdxl()
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    assert refusal(pipeline, tmp_path / "lcm") == said.format("its scheduler is a LCMScheduler")
    pipeline = make_sdxl()
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=8)
    input_of_guidance = (
        "time_cond_proj_dim, the guidance input of latent consistency models, in its U-Net's config.json"
    )
    assert refusal(pipeline, tmp_path / "told") == said.format(input_of_guidance)


def test_a_student_of_ours(student: Path, tmp_path: Path) -> None:
    RdmDistillationPipeline.from_pretrained(student).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a few-step student already; give the teacher that it was distilled from"):
        load_teacher(str(tmp_path), torch.float32)


def test_a_video_model(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(ValueError, match="Teachers of class WanPipeline are not supported; supported are StableDiff"):
        load_teacher(str(tmp_path), torch.float32)


def test_a_student_is_decoded_by_the_autoencoder_that_it_was_trained_with(student: Path) -> None:
    pipeline = RdmDistillationPipeline.from_pretrained(student)
    assert pipeline.vae.config.scaling_factor == 0.9
    own = StableDiffusionXLPipeline.from_pretrained(student.parent / "teacher").vae
    assert own.config.scaling_factor == 1.5
    given = RdmDistillationPipeline.from_pretrained(student, vae=own)
    assert not torch.allclose(draw(given), draw(pipeline), atol=1e-3)


def test_a_student_may_be_put_on_another_base(student: Path, tmp_path: Path) -> None:
    make_pipeline("StableDiffusionXLPipeline", seed=3).save_pretrained(tmp_path)
    other = RdmDistillationPipeline.from_lora(tmp_path, student)
    assert isinstance(other, RdmStableDiffusionXLPipeline)
    same = RdmDistillationPipeline.from_lora(student.parent / "teacher", student)
    assert torch.equal(draw(same), draw(RdmDistillationPipeline.from_pretrained(student)))
    assert not torch.allclose(draw(other), draw(same), atol=1e-3)


def test_a_student_on_a_base_of_another_family(student: Path, tmp_path: Path) -> None:
    make_pipeline("FluxPipeline").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a student of a StableDiffusionXLPipeline, and .* is a FluxPipeline"):
        RdmDistillationPipeline.from_lora(tmp_path, student)


def test_a_stock_pipeline_becomes_a_student_and_shares_its_components(student: Path) -> None:
    stock = StableDiffusionXLPipeline.from_pretrained(student.parent / "teacher")
    stock.vae = RdmDistillationPipeline.from_pretrained(student).vae
    pipeline = RdmDistillationPipeline.from_pipe(stock, student)
    assert pipeline.unet is stock.unet and pipeline.vae is stock.vae
    assert torch.equal(draw(pipeline), draw(RdmDistillationPipeline.from_pretrained(student)))
    again = RdmDistillationPipeline.from_pipe(pipeline)
    assert again.student == pipeline.student and again.unet is pipeline.unet
    with pytest.raises(ValueError, match="A stock pipeline has no student; give its folder or Hub id as `student`"):
        RdmDistillationPipeline.from_pipe(stock)


def test_no_lora_is_trained_that_no_pipeline_loads(prompts_file: Path, tmp_path: Path) -> None:
    make_pipeline("PixArtSigmaPipeline").save_pretrained(tmp_path / "teacher")
    assert not FAMILIES["PixArtSigmaPipeline"].has_lora
    with pytest.raises(ValueError, match="PixArtSigmaPipeline loads no LoRAs, so its students are full ones"):
        train_rdm_lora.main(run_arguments(tmp_path / "teacher", prompts_file, tmp_path / "out"))


def test_another_lora_may_be_stacked_on_a_student(student: Path, prompts_file: Path, tmp_path: Path) -> None:
    arguments = run_arguments(student.parent / "teacher", prompts_file, tmp_path, train_batch_size=4, seed=5)
    train_rdm_lora.main([*arguments, "--learning_rate", "0.05"])
    pipeline = RdmDistillationPipeline.from_pretrained(student)
    alone = draw(pipeline)
    (own,) = pipeline.get_active_adapters()
    pipeline.load_lora_weights(tmp_path, adapter_name="style")
    pipeline.set_adapters([own, "style"], [1.0, 0.8])
    assert not torch.allclose(draw(pipeline), alone, atol=1e-3)
    pipeline.delete_adapters("style")
    assert torch.allclose(draw(pipeline), alone, atol=1e-5)


def test_a_negative_prompt_without_guidance_is_warned_of_and_has_no_effect(student: Path, caplog) -> None:
    pipeline = RdmDistillationPipeline.from_pretrained(student)
    plain = draw(pipeline)
    call = dict(generator=torch.Generator().manual_seed(0), output_type="pt", negative_prompt="a black zero")
    logging.getLogger("rdm_diffusers").propagate = True
    assert torch.equal(pipeline(PROMPTS[0], **call).images, plain)
    assert caplog.text.count("without guidance, so that its negative prompt has no effect") == 1
    call["generator"].manual_seed(0)
    assert not torch.allclose(pipeline(PROMPTS[0], **call, guidance_scale=3.0).images, plain, atol=1e-3)
    assert caplog.text.count("has no effect") == 1
