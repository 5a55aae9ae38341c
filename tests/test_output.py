"""What a run leaves behind: the files, the card whose code runs, the metrics; and what a folder is refused for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from parts import run_arguments
from PIL import Image

import train_rdm_lora
from rdm_diffusers import RdmDistillationPipeline
from rdm_diffusers.evaluation import report, solvers_of, teacher_sampler
from rdm_diffusers.families import load_teacher
from rdm_diffusers.pipelines import StudentConfig

PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


@pytest.fixture(scope="module")
def student(teacher_folder: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA student after two updates, with a checkpoint and a validation."""
    folder = tmp_path_factory.mktemp("student")
    train_rdm_lora.main(
        run_arguments(teacher_folder, prompts_file, folder, checkpointing_steps=2, validation_steps=2, logging_steps=2)
    )
    return folder


@pytest.fixture
def copy_of(student: Path, tmp_path: Path):
    """A student's folder with another `rdm_config.json`."""

    def make(config: bytes | None) -> Path:
        if config is not None:
            (tmp_path / "rdm_config.json").write_bytes(config)
        return tmp_path

    return make


def test_a_run_leaves_the_students_files(student: Path) -> None:
    files = {str(path.relative_to(student)) for path in student.rglob("*") if path.is_file()}
    assert files == {
        *(f"checkpoint-2/{name}.safetensors" for name in ("ema", "fake_score", "statistics", "student")),
        "README.md", "checkpoint-2/state.json", "config.yaml", f"comfyui/{student.name}.safetensors", "metrics.json",
        "logs/health.jsonl", "report.html",
        "pictures/0.png", "pictures/1.png",
        "pytorch_lora_weights.safetensors", "rdm_config.json", "samples.png", "scheduler/scheduler_config.json",
        "validation/step-2.png",
    }  # fmt: skip


def test_a_run_and_a_full_student_hold_no_pickles(student: Path, tmp_path: Path) -> None:
    RdmDistillationPipeline.from_pretrained(student).save_pretrained(tmp_path)
    files = [*student.rglob("*"), *tmp_path.rglob("*")]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    assert not [path for path in files if path.suffix in PICKLES]


def test_the_samples_show_teacher_few_step_teacher_and_student(student: Path) -> None:
    with Image.open(student / "samples.png") as picture:
        assert picture.size == (2 * 96, 3 * (96 + 18))


def test_the_metrics_record_calls_arguments_versions_and_the_seed(student: Path) -> None:
    metrics = json.loads((student / "metrics.json").read_text())
    assert metrics["teacher"]["nfe"] == 100
    assert metrics["teacher_few_step"]["nfe"] == 4
    assert metrics["student"]["nfe"] == 2
    assert metrics["arguments"]["learning_rate"] == 1e-2
    assert metrics["seed"] == 0
    assert {"torch", "diffusers", "python"} <= metrics["versions"].keys()


def test_a_few_images_choose_the_solver_that_all_images_then_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher("tiny", torch.float32).pipeline

    def distances(count: int) -> dict[str, float | None]:
        samplers = {solver: teacher_sampler(teacher, solver, 2, 4.0) for solver in solvers_of(teacher)}
        return {name: report.measure(sampler, name, count).fd_to_teacher for name, sampler in samplers.items()}

    few, many = distances(3), distances(5)
    monkeypatch.setattr(report, "COMPARED_IMAGES", 3)
    found = report.best_few_step_teacher(teacher, 2, 4.0, num_images=5)
    assert found.sampler == min(few, key=few.__getitem__)
    assert (found.num_images, found.fd_to_teacher) == (5, many[found.sampler])


def test_the_card_has_metadata_that_the_hub_reads(student: Path) -> None:
    card = ModelCard.load(student / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert {"lora", "rdm"} <= set(card.data.tags)
    assert card.data.base_model is None  # a local folder means nothing there


def test_the_cards_code_runs(student: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (student / "README.md").read_text(), flags=re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        lines = snippet.strip().splitlines()
        assert lines[-1].startswith("pipeline(")
        names: dict = {}
        exec("\n".join([*lines[:-1], f"image = {lines[-1]}"]), names)
        assert names["image"].size == (32, 32)


def test_a_folder_without_a_student_configuration_is_refused(copy_of) -> None:
    with pytest.raises(ValueError, match=r"has no rdm_config\.json, so it is not a student of ours; load it"):
        RdmDistillationPipeline.from_pretrained(copy_of(None))


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The student .* is neither a local folder nor a valid Hub id"):
        RdmDistillationPipeline.from_pretrained(tmp_path / "missing")


@pytest.mark.parametrize(
    "damage", [b'{"base_model_name_or_path": "tiny", "pipe', b"[]", b'{"pipeline_class": "X"}', b"", b"\x80\x81\xff"]
)
def test_a_damaged_student_configuration_is_one_clear_sentence(copy_of, damage: bytes) -> None:
    with pytest.raises(ValueError, match=r"rdm_config\.json is damaged .*; download or export the student again\."):
        RdmDistillationPipeline.from_pretrained(copy_of(damage))


def test_a_student_that_a_newer_release_made_says_so(copy_of, student: Path) -> None:
    config = json.loads((student / "rdm_config.json").read_text()) | {"format_version": 3, "version": "9.9"}
    with pytest.raises(ValueError, match=r"was made by rdm-diffusers 9\.9, which is newer than this .*; upgrade with"):
        RdmDistillationPipeline.from_pretrained(copy_of(json.dumps(config).encode()))


def test_what_a_newer_release_adds_to_a_students_configuration_does_no_harm(student: Path, copy_of) -> None:
    config = json.loads((student / "rdm_config.json").read_text())
    loaded = StudentConfig.load(str(copy_of(json.dumps(config | {"mood": "good"}).encode())))
    assert loaded == StudentConfig.load(str(student))


def test_the_configuration_tells_grid_eta_guidance_base_method_and_version(student: Path, teacher_folder: Path) -> None:
    config = StudentConfig.load(str(student))
    assert len(config.scheduler["student_timesteps"]) == config.num_inference_steps == 2
    assert (config.scheduler["eta"], config.call_arguments) == (1.0, {"guidance_scale": 0.0})
    assert config.base_model_name_or_path == str(teacher_folder)
    assert (config.arguments["algorithm"], config.arguments["guidance_scale"]) == ("gndm", 2.0)
    assert config.training["command"].startswith("accelerate launch train_rdm_lora.py")
    assert config.version and config.format_version == 1


def test_what_a_run_tells_others_names_no_folder_of_this_machine(student: Path, prompts_file: Path) -> None:
    config, metrics = (json.loads((student / name).read_text()) for name in ("rdm_config.json", "metrics.json"))
    for told in (config["training"], metrics):
        assert str(prompts_file.parent) not in json.dumps(told) and str(student) not in json.dumps(told)


def test_a_student_of_an_unknown_family_is_refused(copy_of, student: Path) -> None:
    config = json.loads((student / "rdm_config.json").read_text()) | {"pipeline_class": "AudioLDMPipeline"}
    with pytest.raises(ValueError, match="Students of AudioLDMPipeline are not supported; supported: StableDiffusionP"):
        RdmDistillationPipeline.from_pretrained(copy_of(json.dumps(config).encode()))


def test_a_student_whose_teacher_is_gone_names_the_teacher(copy_of, student: Path, tmp_path: Path) -> None:
    config = json.loads((student / "rdm_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    with pytest.raises(ValueError, match=f"{tmp_path / 'gone'}.* (does not exist|neither a valid local path)"):
        RdmDistillationPipeline.from_pretrained(copy_of(json.dumps(config).encode()))
