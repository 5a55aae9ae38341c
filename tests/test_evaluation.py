"""`rdm-evaluate` on tiny teachers, students and folders: the same numbers however they come about, and all recorded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from parts_processes import QUIET, in_two_processes
from PIL import Image
from safetensors.torch import load_file, save_file

from rdm_diffusers import RdmDistillationPipeline
from rdm_diffusers.evaluation import command, evaluation_prompts, measure_images, sampling, student_sampler
from rdm_diffusers.evaluation.command import FIRST_SEED
from rdm_diffusers.families import LORA_FILE
from rdm_diffusers.tiny.captions import CAPTIONS

IMAGES, BATCH = 72, 8


def words(folder: Path, **options) -> list[str]:
    """A command line; True is a switch, None leaves a flag out."""
    given = dict(num_images=IMAGES, batch_size=BATCH, output_dir=folder, **options)
    line = []
    for name, value in given.items():
        line += [] if value is None else [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


def numbers(record: dict) -> dict:
    """All that was measured but the speed."""
    return {name: value for name, value in record["metrics"].items() if name != "images_per_second"}


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


@pytest.fixture(scope="module")
def evaluated(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The student's evaluation in one process, and its folder."""
    folder = tmp_path_factory.mktemp("evaluated")
    record = command.main(words(folder, student=tiny_student))
    assert record is not None
    return folder, record


def test_an_evaluation_leaves_its_numbers_its_table_its_pictures_and_a_contact_sheet(evaluated) -> None:
    folder, record = evaluated
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "evaluation.json", "evaluation.md", "contact_sheet.png", "images", "images.json", "speed-0.jsonl",
        "reference_data.safetensors", "reference_teacher.safetensors",
    }  # fmt: skip
    assert sorted(pictures(folder)) == [f"{i:06d}.png" for i in range(IMAGES)]
    assert json.loads((folder / "evaluation.json").read_text()) == record
    assert "| fd_to_teacher | " in (folder / "evaluation.md").read_text()
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.size == (8 * 160, 6 * 160)


def test_every_setting_that_moves_a_number_is_recorded(evaluated, tiny_student: Path) -> None:
    settings, subject = evaluated[1]["settings"], evaluated[1]["subject"]
    assert settings["num_images"] == IMAGES and settings["first_seed"] == FIRST_SEED
    assert settings["dtype"] == "float32" and settings["image_size"] == [32, 32]
    assert settings["prompts"]["count"] == len(CAPTIONS)
    assert settings["features"]["name"] == "tiny" and settings["features"]["resize"] == "none"
    digests = [settings["prompts"], *settings["reference"].values()]
    assert all(len(each["sha256"]) == 64 for each in digests)
    assert len(settings["features"]["weights_sha256"]) == len(subject["weights_sha256"]) == 64
    assert {"torch", "diffusers", "transformers", "peft", "pillow", "numpy"} <= settings["versions"].keys()
    assert subject["num_inference_steps"] == subject["nfe"] == evaluated[1]["metrics"]["nfe"] == 2
    assert subject["name"] == str(tiny_student) and subject["sampler"] == "rdm"
    assert evaluated[1]["metrics"]["images_per_second"] > 0


def test_few_images_are_warned_of_and_have_an_interval(evaluated) -> None:
    for name in ("fd_to_data", "fd_to_teacher"):
        distance = evaluated[1]["metrics"][name]
        assert distance["low"] < distance["value"] < distance["high"]
        assert "72 images are few for 64 features" in distance["warning"]
        assert distance["warning"] in evaluated[1]["notes"]


def test_it_gives_the_numbers_of_a_training_runs_end_but_for_the_rounding_to_8_bits(
    evaluated, tiny_student: Path
) -> None:
    sampler = student_sampler(RdmDistillationPipeline.from_pretrained(tiny_student))
    prompts = evaluation_prompts(IMAGES)
    images, _ = sampler(prompts, range(FIRST_SEED, FIRST_SEED + IMAGES))
    expected, found = measure_images(images, prompts, 2, 0.0, "rdm"), evaluated[1]["metrics"]
    assert found["fd_to_data"]["value"] == pytest.approx(expected.fd_to_data, rel=1e-3)
    assert found["fd_to_teacher"]["value"] == pytest.approx(expected.fd_to_teacher, rel=1e-3)
    assert found["prompt_accuracy"] == pytest.approx(expected.prompt_accuracy)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_the_batch_size_does_not_move_the_numbers(batch_size: int, evaluated, tiny_student: Path, tmp_path) -> None:
    line = words(tmp_path, student=tiny_student)
    line[line.index("--batch_size") + 1] = str(batch_size)
    found, expected = numbers(command.main(line) or {}), numbers(evaluated[1])
    for name in ("fd_to_data", "fd_to_teacher"):
        assert found[name]["value"] == pytest.approx(expected[name]["value"], rel=1e-4)
        assert found[name]["standard_error"] == pytest.approx(expected[name]["standard_error"], rel=1e-3)
    assert found["prompt_accuracy"] == expected["prompt_accuracy"]
    for name, reward in expected["rewards"].items():
        assert found["rewards"][name]["mean"] == pytest.approx(reward["mean"], rel=1e-4)


def launch(line: list[str]) -> subprocess.CompletedProcess:
    """An evaluation in two processes of torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*torchrun, "-m", "rdm_diffusers.evaluation", *line],
        env=os.environ | QUIET | {"PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def test_two_processes_draw_the_very_pictures_of_one(evaluated, tiny_student: Path, tmp_path: Path) -> None:
    in_two_processes(partial(command.main, words(tmp_path, student=tiny_student)))
    assert pictures(tmp_path) == pictures(evaluated[0])
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert numbers(record) == numbers(evaluated[1]) and record["settings"] == evaluated[1]["settings"]
    assert record["context"]["processes"] == 2
    assert all((tmp_path / f"speed-{process}.jsonl").exists() for process in (0, 1))


def test_one_of_two_processes_killed_ends_the_evaluation_and_one_process_finishes_it(
    evaluated, tiny_student: Path, tmp_path: Path
) -> None:
    killer = tmp_path / "reward.py"
    killer.write_text(
        "import os, signal\n\nfrom rdm_diffusers.evaluation import sampling\n\nwhole = sampling.save_image\n\n\n"
        "def save_image(image, path, aside):\n"
        "    if path.name == '000035.png':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    whole(image, path, aside)\n\n\n"
        "sampling.save_image = save_image\n\n\n"
        "def judge(images, prompts):\n    return images.mean((1, 2, 3))\n"
    )
    done = launch(words(tmp_path / "out", student=tiny_student, reward=[f"{killer}:judge"]))
    assert done.returncode != 0 and not (tmp_path / "out" / "evaluation.json").exists()
    assert 20 <= len(list((tmp_path / "out" / "images").glob("0*.png"))) < IMAGES
    record = command.main(words(tmp_path / "out", student=tiny_student))
    assert record is not None and numbers(record) == numbers(evaluated[1])
    assert pictures(tmp_path / "out") == pictures(evaluated[0])


def kill_before_picture(number: int) -> None:
    """The process is killed between a picture's writing and its renaming."""

    def deadly(image: torch.Tensor, path: Path, aside: Path) -> None:
        if path.name == f"{number:06d}.png":
            image = image.clone()
            aside.write_bytes(b"half a picture")
            os.kill(os.getpid(), signal.SIGKILL)
        whole(image, path, aside)

    whole, sampling.save_image = sampling.save_image, deadly


def test_killed_in_the_midst_of_sampling_and_resumed_it_is_an_uninterrupted_one(
    evaluated, tiny_student: Path, tmp_path: Path
) -> None:
    line = words(tmp_path, student=tiny_student)
    child = os.fork()
    if child == 0:
        try:
            kill_before_picture(29)  # the sixth of the fourth batch
            command.main(line)
        finally:
            os._exit(3)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "images").glob("0*.png")}
    assert len(there) == 29
    record = command.main(line)
    assert record is not None and numbers(record) == numbers(evaluated[1])
    assert pictures(tmp_path) == pictures(evaluated[0])
    assert all((tmp_path / "images" / name).stat().st_mtime_ns == written for name, written in there.items())


def test_pictures_that_are_there_are_not_drawn_again(evaluated, tiny_student: Path) -> None:
    folder, record = evaluated
    before = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
    speeds = (folder / "speed-0.jsonl").read_text()
    assert command.main(words(folder, student=tiny_student)) == record
    assert {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()} == before
    assert (folder / "speed-0.jsonl").read_text() == speeds


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 5}, "first_seed was 1000000, is 5"), ({"num_inference_steps": 1}, "num_inference_steps was 2, is 1"),
     ({"dtype": "bfloat16"}, "dtype was float32, is bfloat16"), ({"prompts": "few"}, "prompts_sha256 was ")],
    ids=["seed", "steps", "dtype", "prompts"],
)  # fmt: skip
def test_pictures_of_other_settings_are_never_mixed(
    change: dict, named: str, evaluated, tiny_student: Path, prompts_file: Path
) -> None:
    change = {name: prompts_file if value == "few" else value for name, value in change.items()}
    with pytest.raises(ValueError, match=f"holds pictures of other settings .*{named}.*; choose another --output_dir"):
        command.main(words(evaluated[0], student=tiny_student, **change))


def test_a_student_that_was_trained_further_is_another_one_and_one_that_was_moved_is_not(
    evaluated, tiny_student: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(tiny_student, tmp_path / "moved"))
    assert numbers(command.main(words(evaluated[0], student=moved)) or {}) == numbers(evaluated[1])
    weights = load_file(moved / LORA_FILE)
    save_file({name: 1.01 * tensor for name, tensor in weights.items()}, moved / LORA_FILE, {"format": "pt"})
    with pytest.raises(ValueError, match=r"holds pictures of other settings \(weights_sha256 was \w+, is \w+\)"):
        command.main(words(evaluated[0], student=moved))


def test_a_folder_of_pictures_is_measured_as_its_student(evaluated, tmp_path: Path) -> None:
    options = dict(prompts="tiny", reference_data="tiny", reference_teacher="tiny", reward=["tiny_prompt", "tiny_bold"])
    record = command.main(words(tmp_path, images=evaluated[0] / "images", **options))
    assert record is not None
    assert numbers(record) == numbers(evaluated[1]) and record["settings"] == evaluated[1]["settings"]


def test_a_teacher_is_drawn_with_its_solver_steps_and_guidance(tmp_path: Path) -> None:
    record = command.main(words(tmp_path, teacher="tiny-flow", num_inference_steps=2, solver="dpm-solver++"))
    assert record is not None
    subject = record["subject"]
    assert (subject["sampler"], subject["guidance_scale"], subject["nfe"]) == ("dpm-solver++", 4.0, 4)
    assert subject["call_options"] == {"guidance_scale": 4.0, "max_sequence_length": 1}


def test_any_teacher_with_a_prompt_file_is_drawn_without_a_reference(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    line = words(tmp_path, teacher=teacher_folder, prompts=prompts_file, num_inference_steps=1, reward=["tiny_bold"])
    record = command.main(line)
    assert record is not None
    assert record["subject"]["guidance_scale"] == 7.5  # the stock pipeline's own
    assert record["settings"]["features"] is None and "fd_to_data" not in record["metrics"]
    assert record["metrics"]["rewards"]["tiny_bold"]["standard_error"] > 0


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["--teacher", "tiny", "--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["--teacher", "tiny", "--reward", "nothing"], "There is no reward 'nothing'"),
        (["--teacher", "tiny", "--solver", "euler"], "--solver euler does not sample tiny; use one of ddim"),
        (["--teacher", "tiny", "--prompts", "missing.txt"], "--prompts missing.txt is neither a file nor one of hpdv2"),
        (["--teacher", "tiny", "--reference_data", "missing"], "The folder missing does not exist"),
        (["--images", "missing"], "The folder missing does not exist; give a folder of pictures"),
        (
            ["--student", "missing"],
            "The student 'missing' is neither a local folder nor in the cache, and the Hub cannot be reached",
        ),
        (["--images", ".", "--reward", "tiny_bold"], "No prompts: give --prompts"),
        (["--images", ".", "--solver", "ddim"], "Only a teacher is sampled with --solver; leave this out"),
        (["--teacher", "tiny", "--student", "x"], "not allowed with argument"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(line: list[str], sentence: str, tmp_path: Path, capsys) -> None:
    with pytest.raises((ValueError, SystemExit)) as refused:
        command.main([*line, "--num_images", "2", "--output_dir", str(tmp_path)])
    assert sentence in str(refused.value) + capsys.readouterr().err
    assert not (tmp_path / "images").exists() or not any((tmp_path / "images").iterdir())
