"""Damage of any file that an evaluation reads is noticed before the work, and what can be made again is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rdm_diffusers.evaluation import command
from rdm_diffusers.evaluation.features import load_features, load_reference, save_reference
from rdm_diffusers.evaluation.pictures import read_image, save_image
from rdm_diffusers.evaluation.prompt_sets import load_prompt_set
from rdm_diffusers.evaluation.records import read_json, sealed, unsealed
from rdm_diffusers.evaluation.sampling import LOCK, images_per_second, log_batch, read_record
from rdm_diffusers.folders import locked

MEASURED = ["--num_images", "44", "--batch_size", "11", "--reward", "tiny_bold"]


def draw(folder: Path) -> dict:
    """An evaluation of the tiny teacher at one step, in four batches."""
    line = ["--teacher", "tiny", "--num_inference_steps", "1", "--guidance_scale", "1", "--output_dir", str(folder)]
    record = command.main([*line, *MEASURED])
    assert record is not None
    return {name: value for name, value in record["metrics"].items() if name != "images_per_second"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("drawn") / "out"
    return folder, draw(folder)


@pytest.fixture
def folder(drawn: tuple[Path, dict], tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn[0], tmp_path / "out"))


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


def damage_picture(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / "images" / "000013.png")


PICTURES: dict[str, Callable[[Path], object]] = {
    "a bit": damage_picture(flip),
    "a bit of its header": damage_picture(lambda path: flip(path, 0.02)),
    "cut": damage_picture(lambda path: path.write_bytes(path.read_bytes()[:200])),
    "emptied": damage_picture(lambda path: path.write_bytes(b"")),
    "swapped": damage_picture(lambda path: shutil.copy(path.with_name("000014.png"), path)),
    "another size": damage_picture(lambda path: Image.new("RGB", (8, 8)).save(path)),
}


@pytest.mark.parametrize("damage", PICTURES)
def test_a_picture_that_was_damaged_is_drawn_again_and_the_numbers_are_the_same(
    damage: str, drawn: tuple[Path, dict], folder: Path
) -> None:
    PICTURES[damage](folder)
    with pytest.warns(
        UserWarning, match=r"1 pictures in .* are damaged, the first is 000013.png; they are drawn again"
    ):
        assert draw(folder) == drawn[1]
    assert contents(folder) == contents(drawn[0])


@pytest.mark.parametrize("damage", PICTURES)
def test_a_damaged_picture_of_a_given_folder_is_named_before_anything_is_loaded(
    damage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PICTURES[damage](folder)
    monkeypatch.setattr(command, "load_measures", lambda *arguments: pytest.fail("it was loaded"))
    line = ["--images", str(folder / "images"), "--output_dir", str(tmp_path / "given"), "--prompts", "tiny"]
    with pytest.raises(ValueError, match=r"picture .*000013\.png (cannot be read|was changed since it was drawn)"):
        command.main([*line, *MEASURED])


def test_a_flipped_bit_of_a_picture_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    save_image(torch.rand(3, 16, 16), tmp_path / "a.png", tmp_path / "b.png")
    whole = read_image(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (tmp_path / "a.png").write_bytes(changed)
        try:
            found = read_image(tmp_path / "a.png")
        except ValueError:
            continue
        assert torch.equal(found, whole)


def test_the_speed_leaves_out_damaged_lines_and_says_so(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.touch()
    for seconds in (9.0, 2.0, 1.0):
        log_batch(tmp_path, 0, [picture] * 4, seconds)
    assert images_per_second(tmp_path) == pytest.approx(8 / 3)
    path = tmp_path / "speed-0.jsonl"
    lines = path.read_text().splitlines()
    for damaged in (
        lines[1].replace("2.0", "7.0"),
        lines[1][:30],
        "[1]",
        "{}",
        '{"images": 4, "seconds": NaN}',
        "[" * 9999,
    ):
        path.write_text("\n".join([lines[0], damaged, lines[2]]) + "\n")
        with pytest.warns(UserWarning, match=r"speed-0.jsonl is damaged in line 2; the speed is computed without"):
            assert images_per_second(tmp_path) == pytest.approx(4)
    path.write_bytes(b"\xff\xfe\0")
    with pytest.warns(UserWarning, match="is damaged in line 1"):
        assert images_per_second(tmp_path) is None
    path.write_text('{"images": 8, "seconds": 4.0}\n')  # as version 0.1.0 wrote
    assert images_per_second(tmp_path) == 2


def test_a_line_that_a_kill_cut_short_spoils_no_other(tmp_path: Path) -> None:
    picture, path = tmp_path / "a.png", tmp_path / "speed-0.jsonl"
    picture.touch()
    path.write_text('{"images": 1, "seconds": 5.0}\n{"images": 8, "sec')
    log_batch(tmp_path, 0, [picture], 0.5)
    with pytest.warns(UserWarning, match="is damaged in line 2"):
        assert images_per_second(tmp_path) == 2


def test_pictures_without_the_record_of_what_they_are_are_not_taken(folder: Path) -> None:
    (folder / "images.json").unlink()
    with pytest.raises(ValueError, match=r"holds pictures without their settings \(images\.json\); choose another"):
        draw(folder)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"a": ', "[" * 100_000, '{"nfe": 3, "sha256": "0"}', "\x00"])
def test_a_damaged_record_of_pictures_is_one_sentence(content: str, folder: Path) -> None:
    (folder / "images.json").write_text(content)
    with pytest.raises(ValueError, match=r"images\.json is damaged \(.*\); remove .* and start again"):
        read_record(folder)


def test_a_changed_number_in_a_record_is_noticed(drawn: tuple[Path, dict], folder: Path) -> None:
    text = (folder / "images.json").read_text()
    (folder / "images.json").write_text(text.replace('"num_inference_steps": 1', '"num_inference_steps": 3'))
    with pytest.raises(ValueError, match="it was changed since it was written"):
        read_record(folder)
    path = folder / "evaluation.json"
    value = str(drawn[1]["fd_to_data"]["value"])
    path.write_text(path.read_text().replace(value, "1" + value))
    with pytest.raises(ValueError, match=r"is not a record of rdm-evaluate \(it was changed since it was written\)"):
        read_json(folder)
    record = {"a": [1, 2.5], "b": {"c": None}}
    assert unsealed(json.dumps(sealed(record))) == unsealed(json.dumps(record)) == record


@pytest.mark.parametrize(
    "record",
    [
        {"settings": [], "metrics": {}, "subject": {"kind": "", "name": ""}},
        {"settings": {}, "metrics": {"fd_to_data": {"value": 1}}, "subject": {"kind": "", "name": ""}},
        {"settings": {}, "metrics": {"prompt_accuracy": "high"}, "subject": {"kind": "", "name": ""}},
        {"settings": {}, "metrics": {"rewards": [1]}, "subject": {"kind": "", "name": ""}},
        {"settings": {}, "metrics": {}, "subject": {}},
    ],
)  # fmt: skip
def test_an_evaluation_of_wrong_types_is_one_sentence(record: dict, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"is not a record of rdm-evaluate \(.*\); give its evaluation\.json"):
        read_json(tmp_path)


def test_a_kill_while_it_is_written_leaves_the_evaluation_that_was_there(
    drawn: tuple[Path, dict], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "evaluation.json").read_bytes()

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        draw(folder)
    assert (folder / "evaluation.json").read_bytes() == before
    assert draw(folder) == drawn[1]
    assert {path.name for path in folder.iterdir()} == {path.name for path in drawn[0].iterdir()}


def test_two_evaluations_do_not_draw_into_one_folder_and_a_dead_one_is_in_nobodys_way(folder: Path) -> None:
    holder = f"process {os.getpid()} on .*"
    with locked(folder / LOCK), pytest.raises(ValueError, match=rf"Another rdm-evaluate \({holder}\) draws into"):
        draw(folder)
    child = os.fork()
    if child == 0:
        with locked(folder / LOCK):
            os._exit(0)
    os.waitpid(child, 0)
    (folder / "images" / ".process-7.png").write_bytes(b"half a picture")
    draw(folder)
    assert not [*folder.glob(".*"), *(folder / "images").glob(".*")]


def spoil(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other numbers under the notes of the old ones."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        notes = file.metadata()
    save_file(tensors, path, notes)


@pytest.mark.parametrize("damage", ["a bit", "other numbers", "its notes", "cut"])
def test_damaged_statistics_of_a_reference_are_refused(damage: str, folder: Path) -> None:
    path, features = folder / "reference_data.safetensors", load_features("tiny")
    whole = load_file(path)
    if damage == "a bit":
        flip(path, 0.7)
    elif damage == "other numbers":
        spoil(path, {**whole, "mean": whole["mean"] + 1e-9})
    elif damage == "its notes":
        path.write_bytes(path.read_bytes().replace(b'num_images\\": null', b'num_images\\": 1234', 1))
    else:
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"holds no statistics of rdm-evaluate \(.*\); make them again"):
        load_reference(str(path), "data", features)


def test_statistics_of_version_0_1_0_which_hold_no_digest_are_read(folder: Path, tmp_path: Path) -> None:
    features = load_features("tiny")
    reference = load_reference("tiny", "data", features)
    notes = {"features": features.as_dict(), "sha256": reference.sha256, "num_images": None}
    tensors = {"mean": reference.statistics.mean, "covariance": reference.statistics.covariance}
    save_file(tensors, tmp_path / "old.safetensors", {"reference": json.dumps(notes)})
    old = load_reference(str(tmp_path / "old.safetensors"), "data", features)
    save_reference(reference, features, tmp_path / "new.safetensors")
    new = load_reference(str(tmp_path / "new.safetensors"), "data", features)
    assert old.as_dict() == new.as_dict() == reference.as_dict()
    assert torch.equal(old.statistics.covariance, new.statistics.covariance)


@pytest.mark.parametrize(
    ("mu", "sigma", "sentence"),
    [
        (np.zeros(8), np.eye(8), r"has statistics of \[8\] and \[8, 8\] numbers, and --features tiny has 64 features"),
        (np.zeros(64), np.eye(8), "give a reference made with the same"),
        (np.zeros((64, 1)), np.eye(64), "give a reference made with the same"),
        (np.full(64, np.nan), np.eye(64), "no pictures have such statistics; make it again"),
        (np.zeros(64), np.triu(np.ones((64, 64))), "no pictures have such statistics"),
        (np.array(["a"]), np.eye(64), "is damaged, or has no mu and sigma"),
    ],
    ids=["other features", "unlike", "shape", "nan", "no covariance", "text"],
)
def test_statistics_that_cannot_be_are_refused_before_anything_is_drawn(mu, sigma, sentence: str, tmp_path) -> None:
    np.savez(tmp_path / "a.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match=sentence):
        load_reference(str(tmp_path / "a.npz"), "data", load_features("tiny"))


@pytest.mark.parametrize("content", ["{}", "[1, 2]", "[]", '["a", " "]', '["a", "b"]', "[" * 100_000, ""])
def test_a_damaged_prompt_set_is_one_sentence(content: str, tmp_path: Path) -> None:
    for style in ("anime", "concept-art", "paintings", "photo"):
        (tmp_path / f"{style}.json").write_text('["a prompt"]')
    assert load_prompt_set(f"hpdv2={tmp_path}") == ["a prompt"] * 4
    (tmp_path / "photo.json").write_text(content)
    with pytest.raises(ValueError, match=r"The prompts hpdv2 could not be loaded \(.*\); connect"):
        load_prompt_set(f"hpdv2={tmp_path}")


def test_a_prompt_file_is_read_as_training_reads_it(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa\u2028cat\r\na dog".encode())
    assert load_prompt_set(str(tmp_path / "prompts.txt")) == ["a\u2028cat", "a dog"]
    (tmp_path / "prompts.csv").write_text("text\na cat\n")
    with pytest.raises(ValueError, match="is a table; write its captions into a text file"):
        load_prompt_set(str(tmp_path / "prompts.csv"))
    (tmp_path / "train.jsonl").write_text('{"caption": ["a bus", "a red bus"]}\n')
    assert load_prompt_set(f"coco={tmp_path}") == ["a bus"]


def test_where_nothing_can_be_written_is_known_before_the_work(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(command, "load_measures", lambda *arguments: pytest.fail("it was loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output_dir .*file cannot be written \(.*\); choose another"):
        command.main(["--images", str(folder / "images"), "--output_dir", str(tmp_path / "file"), *MEASURED[:2]])


def test_the_pictures_of_where_we_are_have_their_record_beside(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder / "images")
    record = command.main(["--images", ".", "--output_dir", str(tmp_path / "given"), "--prompts", "tiny", *MEASURED])
    assert record is not None and record["settings"]["first_seed"] == 1_000_000
