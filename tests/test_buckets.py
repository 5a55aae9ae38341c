"""Aspect-ratio buckets: named, drawn in turns, trained on, and sampled from by anyone."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import parse_buckets_string
from parts import make_run, read_state, relative_error, run_arguments, train_only
from parts_families import CALLS, make_pipeline
from parts_processes import in_two_processes
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import train_rdm_lora
from rdm_diffusers.config import RunConfig
from rdm_diffusers.evaluation import command as evaluation
from rdm_diffusers.families import FAMILIES
from rdm_diffusers.families.flow import pack
from rdm_diffusers.hub import write_card
from rdm_diffusers.pipelines import RdmDistillationPipeline
from rdm_diffusers.tiny.captions import CAPTIONS
from rdm_diffusers.training.batches import collect
from rdm_diffusers.training.memory_plan import plan_memory
from rdm_diffusers.training.target import _of_update
from rdm_diffusers.training.target_buckets import images_of_sizes, nearest_buckets
from rdm_diffusers.training.target_images import TargetImages
from rdm_diffusers.training.updates import student_update

SIZES = ("32x32", "48x32", "32x64")
TARGET: dict[str, Any] = dict(
    teacher_target="samples", target_inference_steps=2, target_train_steps=8, target_learning_rate=1e-2, target_rank=2
)


def images_of(it) -> list[TargetImages]:
    return images_of_sizes(it.images, it.distillation, it.teacher, it.config, it.accelerator)


def test_buckets_are_written_as_in_diffusers_or_as_width_and_height() -> None:
    given = ("32,48; 32,32;48,32", "48x32;32;32x48", "48x32;32x32;48,32")
    configs = [RunConfig.of(aspect_ratio_buckets=text, teacher_target="score") for text in given]
    assert {config.teacher.aspect_ratio_buckets for config in configs} == {"32,48;32,32;48,32"}
    assert configs[0].teacher.sizes == ("48x32", 32, "32x48")
    assert parse_buckets_string(configs[0].teacher.aspect_ratio_buckets) == [(32, 48), (32, 32), (48, 32)]


def test_the_size_that_is_shown_is_the_first_bucket_or_another() -> None:
    settings: dict[str, Any] = dict(aspect_ratio_buckets="48x32;32x32", teacher_target="score")
    config = RunConfig.of(**settings)
    assert config.teacher.resolution == "48x32" and "resolution" not in config.as_yaml()
    assert RunConfig.of(**settings, resolution=32).teacher.resolution == 32
    with pytest.raises(ValueError, match="--resolution is 64, which is not among --aspect_ratio_buckets; add it there"):
        RunConfig.of(**settings, resolution=64)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds an empty pair, which is no size"),
        ("32,32;", "holds an empty pair, which is no size"),
        ("32,32,32", "holds 32,32,32, which is no size"),
        ("32x0", "holds 32x0, which is no size"),
        ("32,48;48x32", "holds 48x32 twice, and each size may be there once"),
    ],
)
def test_buckets_that_are_no_sizes_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f'^--aspect_ratio_buckets {said}; give height,width pairs, "1024,1024;'):
        RunConfig.of(aspect_ratio_buckets=text, teacher_target="score")


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    def make(folder: str = "run", **changes: Any) -> list[str]:
        settings = {"aspect_ratio_buckets": "32x32;48x32", **changes}
        prompts = settings.pop("prompts_file", prompts_file)
        return run_arguments(teacher_folder, prompts, tmp_path / folder, **settings)

    return make


def shapes_of(it, rollouts: range) -> list[tuple[int, ...]]:
    return [tuple(it.distillation.of_rollout(number).latent_shape) for number in rollouts]


def test_every_bucket_has_its_turn_in_an_order_that_the_seed_decides(argv) -> None:
    buckets = dict(aspect_ratio_buckets="32x32;48x32;32x48")
    orders = [shapes_of(make_run(argv(f"run-{seed}", seed=seed, **buckets)), range(30)) for seed in (0, 1)]
    for order in orders:
        assert all(len(set(order[start : start + 3])) == 3 for start in range(0, 30, 3))
        assert len({tuple(order[start : start + 3]) for start in range(0, 30, 3)}) > 1
    assert orders[0] != orders[1] and orders[0] == shapes_of(make_run(argv("again", **buckets)), range(30))


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("rollout", [0, 1, 2])
def test_an_update_on_a_bucket_is_that_of_a_run_of_its_size(rollout: int, argv) -> None:
    buckets = make_run(argv("buckets", aspect_ratio_buckets=";".join(SIZES)))
    run = buckets.distillation.of_rollout(rollout)
    size = SIZES[[bucket.latent_shape for bucket in buckets.distillation.buckets].index(run.latent_shape)]
    alone = make_run(argv("alone", aspect_ratio_buckets=None, resolution=size))
    found = []
    for it, at_size in ((buckets, run), (alone, alone.distillation)):
        batch = collect(at_size, rollout)
        student_update(at_size, batch, it.state.statistics)
        found.append((batch.samples.x0, [p.grad for p in it.networks.parameters("student")]))
    assert found[0][0].shape[1:] == run.latent_shape and torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_run_with_buckets_resumes_exactly(argv, tmp_path: Path) -> None:
    (tmp_path / "contrast.py").write_text("def reward(images, prompts):\n    return images.std((1, 2, 3))\n")
    options = dict(
        aspect_ratio_buckets=";".join(SIZES), checkpointing_steps=2, reuse_rollouts=2, max_train_steps=8,
        algorithm="gndmr", reward=[f"{tmp_path}/contrast.py:reward"],
    )  # fmt: skip
    train_only(argv("straight", **options))
    shutil.copytree(tmp_path / "straight" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    train_only(argv("broken", resume_from_checkpoint="latest", **options))
    assert same_state(*(read_state(tmp_path / name / "checkpoint-8") for name in ("straight", "broken")))
    with pytest.raises(ValueError, match=r"--aspect_ratio_buckets \(was 32,32;32,48;64,32, is 32,32\)"):
        train_only(argv("broken", resume_from_checkpoint="latest", **{**options, "aspect_ratio_buckets": "32x32"}))


def test_two_processes_draw_the_same_buckets_and_train_as_one(argv, tmp_path: Path) -> None:
    options = dict(max_train_steps=3, checkpointing_steps=3, aspect_ratio_buckets=";".join(SIZES))
    train_only(argv("one", train_batch_size=16, **options))
    in_two_processes(lambda: train_only(argv("two", train_batch_size=8, **options)))
    one, two = (read_state(tmp_path / name / "checkpoint-3") for name in ("one", "two"))
    names = [name for name in one if "parameter" in name]
    assert names and relative_error([two[name] for name in names], [one[name] for name in names]) < 1e-4


def test_the_memory_plan_is_that_of_the_largest_bucket(argv, teacher_folder: Path) -> None:
    settings: dict[str, Any] = dict(pretrained_model=str(teacher_folder), teacher_target="score", num_student_steps=2)
    buckets = plan_memory(RunConfig.of(aspect_ratio_buckets=";".join(SIZES), **settings))
    assert buckets.phases == plan_memory(RunConfig.of(resolution="32x64", **settings)).phases
    assert buckets.phases != plan_memory(RunConfig.of(resolution="32x32", **settings)).phases


# --- the sizes in SDXL's conditioning -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["score", "samples"])
def test_sdxls_denoiser_is_told_of_each_bucket_what_the_stock_pipeline_tells_it(
    target: str, prompts_file: Path, tmp_path: Path
) -> None:
    stock = make_pipeline("StableDiffusionXLPipeline")
    stock.save_pretrained(tmp_path / "teacher")
    settings = dict(aspect_ratio_buckets="32x32;48x32", cache_dir=tmp_path / "cache")
    if target == "samples":
        settings |= TARGET | dict(num_target_images=40, target_train_steps=1)
    it = make_run(run_arguments(tmp_path / "teacher", prompts_file, tmp_path / "run", **settings))
    told: list[tuple[Tensor, tuple[int, ...]]] = []

    def listen(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told.append((kwargs["added_cond_kwargs"]["time_ids"], tuple(args[0].shape[-2:])))

    expected = {}
    handle = stock.unet.register_forward_pre_hook(listen, with_kwargs=True)
    for height, width in ((32, 32), (32, 48)):
        stock("a", num_inference_steps=1, guidance_scale=3.0, height=height, width=width, output_type="latent")
        (ids, shape) = told.pop()
        assert ids.unique(dim=0).tolist() == [[height, width, 0, 0, height, width]]
        expected[shape] = ids[0]
    handle.remove()
    it.teacher.denoiser.register_forward_pre_hook(listen, with_kwargs=True)
    for number in range(2):
        run = it.distillation.of_rollout(number)
        batch = collect(run, number)
        student_update(run, batch, it.state.statistics)
    assert {shape for _, shape in told} == expected.keys()
    assert all(torch.equal(row, expected[shape]) for ids, shape in told for row in ids)
    roles = ("student", "fake_score", "teacher" if target == "score" else "target")
    assert all(it.networks.calls[f"{role} forward"] for role in roles)
    for images in images_of(it) if target == "samples" else []:
        ids = images.conditioning(torch.arange(2)).tensors["time_ids"]
        assert all(torch.equal(row, expected[tuple(images.latents.shape[-2:])]) for row in ids)


# --- a student at several sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline", "QwenImagePipeline"])
def test_a_student_of_two_buckets_is_drawn_alike_by_anyone_at_any_size(
    name: str, prompts_file: Path, tmp_path: Path
) -> None:
    make_pipeline(name).save_pretrained(tmp_path / "teacher")
    length = CALLS.get(name, {}).get("max_sequence_length")
    options = dict(aspect_ratio_buckets="48x32;32x48", max_sequence_length=length, num_student_steps=4, eta=0)
    train_only(run_arguments(tmp_path / "teacher", prompts_file, tmp_path / "run", **options))
    student = RdmDistillationPipeline.from_pretrained(tmp_path / "run")
    assert {key: student.student.call_arguments[key] for key in ("height", "width")} == {"height": 32, "width": 48}
    assert student.student.sizes == ["48 x 32", "32 x 48"]
    stock = type(make_pipeline(name)).from_pretrained(tmp_path / "teacher")
    stock.load_lora_weights(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text())
    stock.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    grids = set()
    for pipeline in (student, stock):
        pipeline.set_progress_bar_config(disable=True)
    for height, width in ((32, 48), (48, 32), (64, 64)):
        latents = torch.randn(1, *FAMILIES[name].latent_shape(stock, f"{width}x{height}"))
        given = pack(latents) if name != "StableDiffusionXLPipeline" else latents
        call: dict[str, Any] = dict(latents=given, height=height, width=width, output_type="pt")
        ours = student("a red seven", **call).images
        theirs = stock("a red seven", **{**student.student.call_arguments, "num_inference_steps": 4, **call}).images
        assert ours.shape[-2:] == (height, width) and (ours - theirs).abs().max() < 1e-4
        grids |= {tuple(p.scheduler.timesteps.tolist()) for p in (student, stock)}
    assert len(grids) == 1  # the student's times are the same at every size


def test_a_student_warns_of_sizes_that_it_was_not_trained_at(argv, tmp_path: Path, caplog) -> None:
    train_only(argv("run"))
    student = RdmDistillationPipeline.from_pretrained(tmp_path / "run")
    student.set_progress_bar_config(disable=True)
    diffusers_logger = logging.getLogger("diffusers")
    diffusers_logger.addHandler(caplog.handler)
    try:
        student("a red seven", height=32, width=48)
        assert "may be worse" not in caplog.text
        student("a red seven", height=64, width=64)
    finally:
        diffusers_logger.removeHandler(caplog.handler)
    assert "was trained at 32 x 32, 48 x 32 pixels; pictures of 64 x 64 may be worse" in caplog.text


def test_the_card_and_the_file_for_comfyui_name_the_sizes(argv, tmp_path: Path) -> None:
    train_only(argv("run"))
    text = write_card(tmp_path / "run").read_text()
    assert "It was trained at 32 x 32, 48 x 32 pixels (width x height)" in text
    assert "begin with an empty latent image of 32 x 32" in text
    assert "height=32, width=32" in text
    (file,) = (tmp_path / "run" / "comfyui").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.resolution"] == "32x32"


def test_all_that_is_drawn_at_the_end_has_the_default_size_and_an_evaluation_another(argv, tmp_path: Path) -> None:
    settings = dict(aspect_ratio_buckets="48x32;32x48", validation_steps=1)
    train_rdm_lora.main(argv("run", **settings))
    run = tmp_path / "run"
    assert {Image.open(path).size for path in (run / "pictures").glob("*.png")} == {(48, 32)}
    rows = Image.open(run / "samples.png")
    zoom = 96 // 32
    assert rows.width == 2 * 48 * zoom and rows.height > 3 * 32 * zoom
    assert Image.open(run / "validation" / "step-1.png").width == 2 * 48 * zoom
    config = json.loads((run / "rdm_config.json").read_text())
    assert config["format_version"] == 2 and config["call_arguments"]["width"] == 48
    prompts = str(tmp_path / "prompts.txt")
    Path(prompts).write_text("a\nb\n")
    for name, size in (("default", []), ("portrait", ["--resolution", "32x48"])):
        words = ["--student", str(run), "--prompts", prompts, "--output_dir", str(tmp_path / name), *size]
        settings = evaluation.main(words)["settings"]
        assert settings["image_size"] == ([32, 48] if name == "default" else [48, 32])
    with pytest.raises(ValueError, match="draws no pictures of 30 x 48 pixels, because each side"):
        evaluation.main([*words[:-1], "30x48"])


# --- the target ---------------------------------------------------------------------------------------------------


def test_the_teacher_draws_the_target_images_of_every_size_as_a_run_of_that_size_would(argv, tmp_path: Path) -> None:
    settings = dict(TARGET, num_target_images=61, cache_dir=tmp_path / "cache")
    it = make_run(argv(aspect_ratio_buckets=";".join(SIZES), **settings))
    assert it.networks.calls["target backward"] == 8 * 8
    found = images_of(it)
    assert [len(each) for each in found] == [21, 20, 20]
    assert [each.share for each in found] == [21 / 61, 20 / 61, 20 / 61]
    for place, (size, images) in enumerate(zip(SIZES, found, strict=True)):
        alone = make_run(argv(f"run-{size}", aspect_ratio_buckets=None, resolution=size, **settings))
        (whole,) = images_of(alone)
        numbers = list(range(place, 61, 3))
        assert torch.equal(images.prompt_of, whole.prompt_of[numbers])
        assert (images.latents - whole.latents[numbers]).abs().max() < 1e-4
    chosen = {tuple(_of_update(found, update).latents.shape) for update in range(20)}
    assert len(chosen) == 3
    again = make_run(argv("again", aspect_ratio_buckets=";".join(SIZES), **settings))
    assert again.networks.calls == {}  # images and target are read from the cache
    assert json.loads((tmp_path / "again" / "target.json").read_text())["images"] == 61


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of three shapes, 30 of each, the second lying on its side until it is turned as its camera says."""
    place = tmp_path / "images"
    place.mkdir()
    rows = [{"file_name": f"{i:02}.jpg", "text": CAPTIONS[i]} for i in range(90)]
    for i, row in enumerate(rows):
        pixels = np.random.default_rng(i).integers(0, 255, (5, 6, 3), dtype=np.uint8)
        lying = {0x0112: 6} if i % 3 == 1 else {}
        exif = Image.Exif()
        exif.update(lying)
        size = ((40, 40), (40, 66), (33, 70))[i % 3]
        Image.fromarray(pixels).resize(size).save(place / row["file_name"], exif=exif)
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_each_image_of_the_user_has_the_size_that_is_nearest_in_shape(argv, folder: Path, tmp_path: Path) -> None:
    own = dict(TARGET, train_data_dir=folder, prompts_file=None, cache_dir=tmp_path / "cache", random_flip=True)
    own["target_inference_steps"] = None
    it = make_run(argv(aspect_ratio_buckets=";".join(SIZES), **own))
    assert nearest_buckets(it.images, it.config) == [list(range(i, 90, 3)) for i in range(3)]
    found = images_of(it)
    assert [each.latents.shape for each in found] == [(60, 4, 8, 8), (60, 4, 8, 12), (60, 4, 16, 8)]
    for i, images in enumerate(found):
        assert [it.prompts[number] for number in images.prompt_of[:30].tolist()] == list(CAPTIONS[i:90:3])
    middle = it.images.image(4, (32, 48), (0.5, 0.5))
    assert middle.shape == (3, 32, 48)
    mixed = make_run(argv("mixed", aspect_ratio_buckets="32x32;48x32", target_weight=0.5, num_target_images=64, **own))
    shares = [[each.share * share for share, _ in each.sources] for each in images_of(mixed)]
    assert torch.tensor(shares).sum(0).tolist() == pytest.approx([0.5, 0.5])


def test_a_size_without_images_and_too_few_images_are_told(argv, folder: Path, tmp_path: Path) -> None:
    own = dict(TARGET, train_data_dir=folder, prompts_file=None, cache_dir=tmp_path / "cache", monitor_images=1)
    own["target_inference_steps"] = None
    with pytest.warns(UserWarning, match="No image is nearest in shape to 128x32, so that the target learns nothing"):
        it = make_run(argv(aspect_ratio_buckets="32x32;32x64;128x32", **own))
    assert [each.latents.shape[1:] for each in images_of(it)] == [(4, 8, 8), (4, 16, 8)]
    with pytest.raises(ValueError, match="The most images that one of --aspect_ratio_buckets has are 10; the target"):
        make_run(argv(aspect_ratio_buckets="32x32;48x32;32x64", max_train_samples=30, **own))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"num_target_images": 50},
            "--num_target_images is 50; it must be at least 20 for each of the 3 --asp",
        ),
        ({"target_images_dir": "there"}, "--target_images_dir is for images of one size; leave it out, or --aspect_"),
    ],
)
def test_a_target_that_cannot_have_buckets_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        RunConfig.of(aspect_ratio_buckets=";".join(SIZES), teacher_target="samples", **changes)
