"""The user's own images as the target: found with their captions, encoded once, learnt alone or with the teacher's."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from parts import PROMPTS, make_run, run_arguments
from PIL import Image

from rdm_diffusers.config import RunConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.tiny.captions import CAPTIONS
from rdm_diffusers.training import shared_parts, target_images, user_images
from rdm_diffusers.training.prompts import load_prompts
from rdm_diffusers.training.run_folder import check_resumable
from rdm_diffusers.training.user_images import find_user_images

IMAGES = 70  # two parts


def picture(number: int, width: int = 50, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of captions that are in no prompts file, in an imagefolder with a split's name in it."""
    place = tmp_path / "images"
    (place / "test").mkdir(parents=True)
    rows = [{"file_name": f"{'test/' if i % 2 else ''}{i:02}.png", "text": CAPTIONS[i]} for i in range(IMAGES)]
    for i, row in enumerate(rows):
        picture(i).save(place / row["file_name"])
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture
def argv(teacher_folder: Path, folder: Path, tmp_path: Path):
    """Makes the command line of a run whose target is the folder's images, with a cache of this test."""

    def make(name: str = "run", **changes) -> list[str]:
        options = dict(
            teacher_target="samples", train_data_dir=folder, target_train_steps=3, target_learning_rate=1e-2,
            target_rank=2, cache_dir=tmp_path / "cache",
        )  # fmt: skip
        prompts: Any = changes.pop("prompts_file", None)
        return run_arguments(teacher_folder, prompts, tmp_path / name, **{**options, **changes})

    return make


def read(**changes) -> user_images.UserImages:
    found = find_user_images(RunConfig.of(teacher_target="samples", **changes).prompts)
    assert found is not None
    return found


def images_of(it) -> target_images.TargetImages:
    return user_images.user_target_images(it.images, it.distillation, it.teacher, it.config, it.accelerator)


def test_each_image_is_learnt_with_its_own_caption_and_the_teacher_draws_none(argv, tmp_path: Path) -> None:
    it = make_run(argv(center_crop=True, random_flip=True, monitor_images=1))
    assert it.prompts == it.images.captions and sorted(it.prompts) == sorted(CAPTIONS[:IMAGES])
    assert it.networks.calls["teacher forward"] == 2 * 2 * (IMAGES // 20)  # guided: the held-out loss alone
    images = images_of(it)
    assert it.state.monitor.teacher_contrast == images.latents.std().item()  # the student's is compared with theirs
    numbers = torch.tensor([0, 3, 69])
    small = [picture(CAPTIONS.index(it.prompts[i])).resize((40, 32), Image.Resampling.LANCZOS) for i in numbers]
    squares = [image.crop((4, 0, 36, 32)) for image in small]  # as the example scripts do it
    pixels = torch.stack([torch.tensor(np.array(square)) for square in squares]).permute(0, 3, 1, 2) / 255
    expected = it.teacher.family.encode(it.teacher.pipeline, pixels)
    assert (images.latents[numbers] - expected).abs().max() < 1e-5
    mirrored = it.teacher.family.encode(it.teacher.pipeline, pixels.flip(-1))
    assert (images.latents[numbers + IMAGES] - mirrored).abs().max() < 1e-5
    embeds = images.conditioning(numbers).tensors["prompt_embeds"]
    assert torch.equal(embeds, it.distillation.prompts.once(numbers.tolist()).tensors["prompt_embeds"])
    assert json.loads((tmp_path / "run" / "target.json").read_text())["images"] == 2 * IMAGES


def test_prompts_of_a_file_leave_the_images_their_own_captions(argv, prompts_file: Path) -> None:
    it = make_run(argv(prompts_file=prompts_file, encode_prompts="on_the_fly"))
    assert it.prompts == list(PROMPTS) and set(it.texts.shown) <= set(PROMPTS)
    found = images_of(it).conditioning(torch.arange(3)).tensors["prompt_embeds"]
    expected = it.teacher.encode_prompts(it.images.captions[:3]).tensors["prompt_embeds"]
    assert torch.equal(found, expected)


def test_the_weight_is_the_share_of_the_users_images_and_none_of_the_held_out_is_trained_on(argv) -> None:
    it = make_run(argv(target_weight=0.25, num_target_images=64, target_inference_steps=2, random_flip=True))
    images = images_of(it)
    assert len(images) == 2 * IMAGES + 64
    chosen, held_out = images.chosen(torch.arange(4000) / 4000), images.held_out
    own = chosen < 2 * IMAGES
    assert own.float().mean() == 0.25 and [share for share, _ in held_out] == [0.25, 0.75]
    numbers = [part.tolist() for _, part in held_out]
    assert numbers == [[19, 89, 39, 109, 59, 129], [159, 179, 199]]  # an image and its mirror image together
    assert set(chosen.tolist()) | {*numbers[0], *numbers[1]} == set(range(len(images)))
    assert not set(chosen.tolist()) & {*numbers[0], *numbers[1]}


def test_images_are_encoded_once_and_an_interrupted_encoding_goes_on(
    argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = make_run(argv(random_flip=True))
    whole, parts = images_of(it).latents, sorted((tmp_path / "cache" / user_images.FOLDER).rglob("0*.safetensors"))
    before = [part.read_bytes() for part in parts]
    assert len(parts) == 2
    parts[0].unlink()
    parts[1].write_bytes(before[1][:-1] + bytes([before[1][-1] ^ 1]))
    write = shared_parts.write_part

    def interrupted(*part) -> None:
        write(*part)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shared_parts, "write_part", interrupted)
        with (
            pytest.raises(KeyboardInterrupt),
            pytest.warns(UserWarning, match="that part is made anew"),
        ):
            images_of(it)
    assert parts[0].read_bytes() == before[0] and parts[1].read_bytes() != before[1]
    with pytest.warns(UserWarning, match="that part is made anew"):
        assert torch.equal(images_of(it).latents, whole)
    with monkeypatch.context() as patch:
        patch.setattr(shared_parts, "write_part", None)  # nothing is encoded again
        assert torch.equal(images_of(it).latents, whole)


def test_a_crop_has_the_trained_size_keeps_the_shape_of_things_and_is_always_the_same(folder: Path) -> None:
    stripes = Image.fromarray(np.repeat(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], 40, 0).repeat(3, 2))
    stripes.save(folder / "00.png")
    images = read(train_data_dir=folder)
    left, middle, right = (images.image(0, (40, 40), (x, 0.5))[0, 20] * 255 for x in (0.0, 0.5, 1.0))
    assert [round(float(line[0])) for line in (left, middle, right)] == [0, 80, 160]
    wide = images.image(0, (20, 60), (0.5, 0.5))
    assert wide.shape == (3, 20, 60) and torch.equal(wide[:, 5], wide[:, 15])
    places = {tuple(user_images._cropped(images, 0, (40, 40), False)[0, 20].tolist()) for _ in range(3)}
    assert len(places) == 1 and places != {tuple((middle / 255).tolist())}


def test_images_and_captions_of_a_dataset_are_paired(tmp_path: Path) -> None:
    rows = {
        "picture": [{"bytes": path_bytes(i), "path": f"{i}.png"} for i in range(22)],
        "all": [[f"{i} a", f"{i} b"] if i != 7 else [] for i in range(22)],
    }
    features = datasets.Features({"picture": datasets.Image(), "all": datasets.Sequence(datasets.Value("string"))})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "data.parquet")
    flags = dict(dataset_name=tmp_path / "data.parquet", image_column="picture", caption_column="all")
    with pytest.warns(UserWarning, match="1 of 22 rows of .* have no text in all; they are left out"):
        images = read(**flags)
    texts = [images.captions[i] for i in images.caption_of]
    kept = [i for i in range(22) if i != 7]
    assert texts == [f"{i} {'ab'[place % 2]}" for place, i in enumerate(kept)]
    assert torch.equal(
        images.image(7, (40, 40), (0.0, 0.0)), torch.tensor(np.array(picture(8, 40, 40))).permute(2, 0, 1) / 255
    )
    config = RunConfig.of(teacher_target="samples", **flags)
    assert load_prompts(config.prompts, "tiny", images.captions) == images.captions
    assert len(read(**flags | {"max_train_samples": 21})) == 20


def path_bytes(number: int) -> bytes:
    file = io.BytesIO()
    picture(number, 40, 40).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("cut", r"is damaged \(.*\); replace it, or take it out\."),
        ("gone", r"cannot be read \(No such file or directory\); take it out\."),
        ("noise", r"is no image that can be read here; use PNG, JPEG"),
        ("eps", r"is no image that can be read here; use PNG, JPEG"),
        ("bomb", r"has 9,000 x 9,000 pixels; make it smaller than 67,108,864 in all\."),
    ],
)
def test_an_image_that_cannot_be_used_is_named_in_one_sentence(content: str, sentence: str, folder: Path) -> None:
    path = folder / "04.png"
    if content == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif content == "noise":
        path.write_bytes(b"no image")
    elif content == "eps":
        picture(4).save(path, "EPS")
    else:
        Image.new("1", (9000, 9000)).save(path)
    images = read(train_data_dir=folder)
    if content == "gone":
        path.unlink()
    row = next(i for i in range(IMAGES) if images.captions[i] == CAPTIONS[4]) + 1
    with pytest.raises(
        ValueError, match=rf"--train_data_dir .*: the image of row {row} \(.*04\.png\) {sentence}"
    ) as told:
        assert images.digest  # is found before the run loads anything, but for images that are cut off
        images.image(row - 1, (32, 32), (0.0, 0.0))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--teacher_target score --train_data_dir x", "--train_data_dir would have no effect; .* add --teacher_target"),
        ("--teacher_target score --center_crop", "--center_crop would have no effect; .* add --teacher_target samples"),
        ("--teacher_target samples --target_weight .5", "--target_weight would have no effect; .* add --train_data"),
        ("--teacher_target samples --random_flip", "--random_flip would have no effect; .* add --train_data_dir"),
        ("--teacher_target samples --train_data_dir x --num_target_images 50",
         "--num_target_images would have no effect; leave it out, or .* with a --target_weight below 1"),
    ],
)  # fmt: skip
def test_a_flag_of_images_is_refused_where_it_would_have_no_effect(words: str, sentence: str, capsys) -> None:
    with pytest.raises(SystemExit):
        parse_args(words.split())
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"dataset_name": "y"}, "--train_data_dir and --dataset_name both name the data; leave one of them out"),
        ({"image_column": "image"}, "--image_column would have no effect without --dataset_name"),
        ({"caption_column": "words"}, "--caption_column words is not in .*; its columns are image, text"),
        ({"max_train_samples": 19}, "holds 19 images with captions; the target needs at least 20"),
        ({"train_data_dir": "nowhere"}, "--train_data_dir nowhere cannot be read .*; give a folder of images"),
    ],
)
def test_images_that_are_not_well_named_are_one_sentence(flags: dict, sentence: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=sentence) as told:
        read(**{"train_data_dir": folder, **flags})
    assert "\n" not in str(told.value)


def test_a_run_goes_on_with_the_same_images_wherever_they_are_and_with_no_others(folder: Path, tmp_path: Path) -> None:
    def arguments(place: Path, **changes) -> dict:
        flags = dict(train_data_dir=place, **changes)
        recorded = RunConfig.of(teacher_target="samples", **flags).as_arguments()
        return json.loads(json.dumps(recorded | {"images_sha256": read(**flags).digest}))

    saved = arguments(folder)
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    check_resumable(arguments(moved), saved)
    with pytest.raises(ValueError, match=r"other arguments: --random_flip \(was False, is True\); set"):
        check_resumable(arguments(moved, random_flip=True), saved)
    picture(99).save(moved / "00.png")
    with pytest.raises(ValueError, match="was made with other arguments: other images; set"):
        check_resumable(arguments(moved), saved)


def test_a_checkpoint_from_before_there_were_images_goes_on_without_them_alone() -> None:
    now = parse_args(["--guidance_scale", "3"]).as_arguments()
    older = {name: value for name, value in now.items() if name not in ("train_data_dir", "target_weight")}
    check_resumable(now | {"images_sha256": None}, older)
    with pytest.raises(ValueError, match="other images"):
        check_resumable(now | {"images_sha256": "0" * 64}, older)
