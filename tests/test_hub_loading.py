"""Students and teachers of the Hub, from a server on this machine that serves local folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from diffusers import StableDiffusionPipeline
from hub_repositories import Repository
from hub_server import HubServer, visitor_environment
from huggingface_hub import ModelCard
from parts import PROMPTS, run_arguments
from parts_single_file import original, write_file
from safetensors.torch import load, load_file, save
from torch import Tensor

import train_rdm_lora
from rdm_diffusers import RdmDistillationPipeline
from rdm_diffusers.commands import export
from rdm_diffusers.families import LORA_FILE, Lora, load_teacher
from rdm_diffusers.folders import digest_of_file
from rdm_diffusers.prompts import read_captions

FILE = "me/models/xl/anime.safetensors"
TOLERANCE = 1e-5  # of a picture in [0, 1]
TOKEN, KEY = "hf_dummytoken", "hf_key"  # what the visitor is logged in with, and what opens private repositories
CAPTIONS = [f"caption {i}" for i in range(12)]
PICKLES = (".bin", ".ckpt", ".pt")


def draw(student: str | Path, **options: str) -> Tensor:
    """Three pictures `[3, 3, 32, 32]` in [0, 1] of a freshly loaded student."""
    pipeline = RdmDistillationPipeline.from_pretrained(student, **options)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    return pipeline(list(PROMPTS[:3]), generator=generators, output_type="pt").images


def outcome(load: Callable[..., object], *args: object, **options: object) -> tuple[str, str, str]:
    """The class, the message and the traceback of the error that a call raises."""
    try:
        load(*args, **options)
    except Exception as error:
        return type(error).__name__, str(error), "".join(traceback.format_exception(error))
    return "", "", ""


def visit(prompts_file: Path, folder: Path) -> None:
    """All that is tested here, by one process that knows the Hub under another address from its start."""
    torch.save(draw("me/student"), folder / "pictures.pt")
    for kind in ("full", "lora", "comfyui"):
        export.main(["me/student", "--format", kind, "--output_dir", str(folder / "exports" / kind)])
    arguments = run_arguments("me/teacher", prompts_file, folder / "student", checkpointing_steps=2)
    train_rdm_lora.main(["--pretrained_model", *arguments[1:]])
    torch.save(draw("me/of-file"), folder / "of-file.pt")
    outcomes = {
        "student of a missing teacher": outcome(RdmDistillationPipeline.from_pretrained, "me/orphan"),
        "student of a private teacher": outcome(RdmDistillationPipeline.from_pretrained, "me/locked-out"),
    }
    for kind, loader in ("student", RdmDistillationPipeline.from_pretrained), ("teacher", load_teacher):
        options = {"dtype": torch.float32} if kind == "teacher" else {}
        for state in ("missing", "private"):
            outcomes[f"{state} {kind}"] = outcome(loader, f"me/{state}-{kind}", **options)
    load_student = RdmDistillationPipeline.from_pretrained
    outcomes["student of a gated teacher"] = outcome(load_student, "me/of-gated")
    for name in ("me/student", f"me/student/{LORA_FILE}"):
        assert Lora.parse(f"{name}:0.5").exact() == Lora(f"me/student/{LORA_FILE}", 0.5)
    outcomes["no LoRA"] = outcome(Lora("me/teacher").file)
    outcomes["missing LoRA"] = outcome(Lora("me/missing-lora/style.safetensors").file)
    outcomes["no student"] = outcome(load_student, "me/teacher")
    outcomes["newer student"] = outcome(load_student, "me/newer")
    outcomes["missing revision"] = outcome(load_student, "me/student", revision="nowhere")
    for revision in ("v1", "turbo"):
        torch.save(draw("me/student", revision=revision), folder / f"{revision}.pt")
    outcomes["student with a private autoencoder"] = outcome(draw, "me/with-vae", token=KEY)
    outcomes["private student with its key"] = outcome(draw, "me/private-student", token=KEY)  # late: it is cached
    checkpoint = of_private_teacher(folder / "student" / "checkpoint-2", folder / "checkpoint-2")
    sources = {"private": "me/private-student", "base": "me/locked-out", "run": checkpoint}
    for name, source in sources.items():
        kind = "comfyui" if name == "private" else "lora"
        words = [str(source), "--format", kind, "--output_dir", str(folder / "exports" / name), "--token", KEY]
        with patch.dict(os.environ):  # a process of its own would forget the token
            outcomes[f"{name} export with its key"] = outcome(export.main, words)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))
    captions = [read_captions("me/pictures", "text", most=most) for most in (5, None)]
    (folder / "captions.json").write_text(json.dumps(captions))


def of_private_teacher(checkpoint: Path, target: Path) -> Path:
    """A copy of a checkpoint, as if its teacher had been a private one."""
    record = json.loads((shutil.copytree(checkpoint, target) / "state.json").read_text())
    record["arguments"]["pretrained_model_name_or_path"] = "me/private-teacher"
    del record["digest"]
    (target / "state.json").write_text(json.dumps(record))
    return target


@dataclass(frozen=True)
class Visit:
    """What a visit left behind: its folder, what it printed, and the paths that it asked the server for."""

    folder: Path
    printed: str
    requested: list[str]
    sent: Counter[str]

    @property
    def outcomes(self) -> dict[str, list[str]]:
        return json.loads((self.folder / "outcomes.json").read_text())


@pytest.fixture(scope="module")
def student(teacher_folder: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA student of the local teacher, after two updates."""
    folder = tmp_path_factory.mktemp("student")
    train_rdm_lora.main(run_arguments(teacher_folder, prompts_file, folder))
    return folder


def as_repository(source: Path, target: Path, base: str | None = None, **changes: object) -> Path:
    """A copy of a folder, with pickled weights beside its safetensors; a student may have another configuration."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint-*", "logs"))
    for weights in list(target.rglob("*.safetensors")):
        for suffix in PICKLES:
            weights.with_suffix(suffix).write_bytes(b"never to be read")
    changes |= {"base_model_name_or_path": base} if base else {}
    if changes:
        config = json.loads((target / "rdm_config.json").read_text())
        (target / "rdm_config.json").write_text(json.dumps(config | changes))
    return target


def single_file(teacher_folder: Path, folder: Path) -> Path:
    """A folder with a teacher as a single file in it."""
    (folder / "xl").mkdir(parents=True)
    write_file(folder / "xl" / "anime.safetensors", original(StableDiffusionPipeline.from_pretrained(teacher_folder)))
    return folder


def without_weights(teacher_folder: Path, folder: Path) -> Path:
    """A teacher's configuration alone."""
    return Path(shutil.copytree(teacher_folder, folder, ignore=shutil.ignore_patterns("*.safetensors")))


def record_of(folder: Path) -> dict[str, object]:
    """What a student of that single file records of it."""
    digest = digest_of_file(folder / "xl" / "anime.safetensors")
    return {"config": "me/bare", "sha256": digest, "parts": ["unet", "text_encoder", "vae"]}


def write_pictures(folder: Path) -> Path:
    """A dataset of pictures of 200 kB with captions, of which its card says that it is far larger than any disk."""
    columns = {"image": [{"bytes": os.urandom(200_000), "path": None} for _ in CAPTIONS], "text": CAPTIONS}
    rows = Dataset.from_dict(columns, Features({"image": Image(), "text": Value("string")}))
    folder.mkdir()
    rows.to_parquet(folder / "train-00000-of-00001.parquet", batch_size=4)
    splits = [{"name": "train", "num_bytes": 10**18, "num_examples": len(CAPTIONS)}]
    info = {
        "features": rows.features._to_yaml_list(),
        "splits": splits,
        "dataset_size": 10**18,
        "download_size": 10**18,
    }
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'dataset_info': info})}---\n")
    return folder


def twofold(student: Repository) -> None:
    """Gives a student a tag for what it is, and a branch with twice its weights."""
    first = student.commits[student.branches["main"]]
    student.tags["v1"] = first.oid
    doubled = {name: 2 * tensor for name, tensor in load(first.files[LORA_FILE]).items()}
    student.branches["turbo"] = first.oid
    student.add("turbo", {LORA_FILE: save(doubled)}, "twice the weights")


@pytest.fixture(scope="module")
def visited(teacher_folder: Path, student: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Visit:
    """A visit to a server with a teacher and its student, public and private."""
    root, folder = tmp_path_factory.mktemp("repositories"), tmp_path_factory.mktemp("visit")
    repositories = {
        "me/teacher": as_repository(teacher_folder, root / "teacher"),
        "me/student": as_repository(student, root / "student", "me/teacher"),
        "me/orphan": as_repository(student, root / "orphan", "me/missing-teacher"),
        "me/locked-out": as_repository(student, root / "locked-out", "me/private-teacher"),
        "me/of-gated": as_repository(student, root / "of-gated", "me/gated-teacher"),
        "me/with-vae": as_repository(student, root / "with-vae", "me/teacher", vae="me/private-vae"),
        "me/private-vae": as_repository(teacher_folder / "vae", root / "vae"),
        "me/pictures": write_pictures(root / "pictures"),
        "me/models": single_file(teacher_folder, root / "models"),
        "me/bare": without_weights(teacher_folder, root / "bare"),
        "me/of-file": as_repository(student, root / "of-file", FILE, base_file=record_of(root / "models")),
        "me/newer": as_repository(student, root / "newer", format_version=3, version="9.9"),
    }
    repositories["me/private-teacher"] = repositories["me/teacher"]
    repositories["me/private-student"] = repositories["me/student"]
    repositories["me/gated-teacher"] = repositories["me/teacher"]
    keys = {name: KEY for name in ("me/private-teacher", "me/private-student", "me/private-vae")}
    with HubServer(repositories, keys) as hub:
        hub.repositories["me/gated-teacher"].gated = True
        twofold(hub.repositories["me/student"])
        environment = visitor_environment(folder / "home", HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
        code = "import sys, pathlib, test_hub_loading; test_hub_loading.visit(*map(pathlib.Path, sys.argv[1:]))"
        command = [sys.executable, "-c", code, str(prompts_file), str(folder)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return Visit(folder, done.stdout + done.stderr, hub.requested, hub.sent)


def test_a_student_of_the_hub_finds_its_teacher_there_and_draws_what_the_local_folders_draw(
    visited: Visit, student: Path
) -> None:
    pictures = torch.load(visited.folder / "pictures.pt", weights_only=True)
    assert any(path.startswith("/me/teacher/resolve/") and path.endswith(".safetensors") for path in visited.requested)
    assert float((pictures - draw(student)).abs().max()) <= TOLERANCE


def test_a_student_of_a_single_file_of_the_hub_finds_the_file_and_the_configuration_there(
    visited: Visit, student: Path
) -> None:
    pictures = torch.load(visited.folder / "of-file.pt", weights_only=True)
    assert float((pictures - draw(student)).abs().max()) <= TOLERANCE
    assert any("/me/models/resolve/" in path and path.endswith("xl/anime.safetensors") for path in visited.requested)
    assert any("/me/bare/resolve/" in path for path in visited.requested)


def test_of_a_dataset_of_the_hub_the_captions_are_downloaded_and_not_the_pictures(visited: Visit) -> None:
    first, all_of_them = json.loads((visited.folder / "captions.json").read_text())
    assert first == [[caption] for caption in CAPTIONS[:5]] and all_of_them == [[caption] for caption in CAPTIONS]
    sizes = {path: size for path, size in visited.sent.items() if path.endswith(".parquet")}
    assert len(sizes) == 1 and 0 < sum(sizes.values()) < 2_400_000 / 3


def test_a_student_of_a_teacher_of_the_hub_names_it_in_its_configuration_and_card(visited: Visit) -> None:
    folder = visited.folder / "student"
    assert json.loads((folder / "rdm_config.json").read_text())["base_model_name_or_path"] == "me/teacher"
    assert ModelCard.load(folder / "README.md").data.base_model == "me/teacher"


def test_a_student_is_loaded_by_its_revision(visited: Visit, student: Path) -> None:
    first, turbo = (torch.load(visited.folder / f"{name}.pt", weights_only=True) for name in ("v1", "turbo"))
    assert float((first - draw(student)).abs().max()) <= TOLERANCE
    assert float((turbo - first).abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("tried", "sentence"),
    [
        (
            "student of a gated teacher",
            "The teacher 'me/gated-teacher' is gated; accept its terms at https://huggingfac",
        ),
        ("no LoRA", "me/teacher holds no LoRA; give a safetensors file, or a folder or Hub id with one."),
        ("missing LoRA", "The LoRA 'me/missing-lora' is not a local folder and was not found on the Hub; check its"),
        ("no student", "The student 'me/teacher' lacks a file that every student has; check its name."),
        ("newer student", "me/newer was made by rdm-diffusers 9.9, which is newer than this "),
        (
            "missing revision",
            "The student 'me/student' has no revision 'nowhere'; give one of its branches, tags or commits.",
        ),
    ],
)
def test_what_cannot_be_loaded_is_said_in_a_sentence(visited: Visit, tried: str, sentence: str) -> None:
    error, message, _ = visited.outcomes[tried]
    assert error == "ValueError"
    assert message.startswith(sentence)
    assert message.removesuffix("`.").count(". ") == 0 and "\n" not in message


@pytest.mark.parametrize("tried", ["private student with its key", "student with a private autoencoder"])
def test_what_is_private_opens_with_the_token_that_is_given(visited: Visit, tried: str) -> None:
    assert visited.outcomes[tried] == ["", "", ""]


def test_a_student_of_the_hub_is_exported_in_every_format(visited: Visit, student: Path) -> None:
    folder = visited.folder / "exports"
    assert float((draw(folder / "full") - draw(student)).abs().max()) <= TOLERANCE
    ours, theirs = (load_file(path) for path in (folder / "lora" / LORA_FILE, student / LORA_FILE))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all((folder / name / f"{name}.safetensors").exists() for name in ("comfyui", "private"))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_was_found_of_a_student_comes_with_it_from_the_hub(visited: Visit, student: Path, kind: str) -> None:
    for name in ("samples.png", "metrics.json", "pictures/0.png", "pictures/1.png"):
        assert (visited.folder / "exports" / kind / name).read_bytes() == (student / name).read_bytes()


@pytest.mark.parametrize("what", ["private", "base", "run"])
def test_an_exports_token_opens_the_student_its_base_and_the_teacher_of_a_checkpoint(visited: Visit, what: str) -> None:
    assert visited.outcomes[f"{what} export with its key"] == ["", "", ""]


@pytest.mark.parametrize("kind", ["student", "teacher"])
@pytest.mark.parametrize("state", ["missing", "private"])
def test_a_repository_that_cannot_be_had_is_named_in_one_sentence(visited: Visit, state: str, kind: str) -> None:
    error, message, _ = visited.outcomes[f"{state} {kind}"]
    assert error == "ValueError"
    assert f"'me/{state}-{kind}'" in message
    assert message.endswith(".") and "\n" not in message and ". " not in message


@pytest.mark.parametrize("state", ["missing", "private"])
def test_a_students_teacher_that_cannot_be_had_is_named_in_one_sentence(visited: Visit, state: str) -> None:
    error, message, _ = visited.outcomes[f"student of a {state} teacher"]
    assert error == "ValueError"
    assert f"'me/{state}-teacher'" in message
    assert message.endswith(".") and "\n" not in message and ". " not in message


def test_no_token_is_printed_raised_or_written(visited: Visit) -> None:
    files = [path for path in visited.folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for token in (TOKEN, KEY):
        assert token not in visited.printed
        assert [path for path in files if token.encode() in path.read_bytes()] == []
        assert [name for name, texts in visited.outcomes.items() if any(token in text for text in texts)] == []


def test_only_safetensors_are_fetched(visited: Visit) -> None:
    assert [path for path in visited.requested if path.endswith(PICKLES)] == []
    assert sum(path.endswith(".safetensors") for path in visited.requested) > 4
