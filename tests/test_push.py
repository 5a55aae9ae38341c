"""Students on the Hub: what goes up, what stays at home, and what a user is told when it fails."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_repositories import SILENCE, sha256
from hub_server import HubServer, visitor_environment
from parts import PROMPTS
from push_visit import AGAIN, COMFY, LORA, OWN, READER, TOKEN, digests
from safetensors.torch import load_file, save_file

from rdm_diffusers import RdmDistillationPipeline
from rdm_diffusers.commands import push as command
from rdm_diffusers.config import RunConfig
from rdm_diffusers.hub import push, student_files
from rdm_diffusers.training.publish import repository

CARD = "# A student\n\n```python\nstudent = {student!r}\nload(student)\n```\n\nThe student = card\n"
GOES_UP = {
    "README.md", "rdm_config.json", "samples.png", "pictures/0.png", "pictures/1.png", "metrics.json", LORA, COMFY,
    "scheduler/scheduler_config.json",
}  # fmt: skip
STAYS = (
    "checkpoint-2/student.safetensors", "checkpoint-2/state.json", "logs/events", "validation/step-1.png", ".env",
    "pictures/.hidden.png", "pictures/notes.txt", "optimizer.bin", "student.pkl", "scheduler/.cache.json",
    "comfyui/student.pt", "unet/config.json", "notes.md", "scheduler/weights.bin",
)  # fmt: skip
VISIT = f"""
import os, pathlib, sys
from hub_server import HubServer
with HubServer({{}}, {{}}, {{{TOKEN!r}: "me", {READER!r}: "me"}}, ({READER!r},)) as hub:
    os.environ["HF_ENDPOINT"] = hub.address
    import push_visit
    push_visit.visit(hub, *map(pathlib.Path, sys.argv[1:]))
"""


# Started in the background, as by nohup, a process and its children ignore Ctrl-C.
PUSH = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from rdm_diffusers.commands.push import run
run()
"""


def fill(folder: Path, student: Path) -> Path:
    """A copy of a student with all that can lie in its folder."""
    shutil.copytree(student, folder, ignore=shutil.ignore_patterns("checkpoint-*", "logs", "comfyui"))
    for path in STAYS:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"something")
    (folder / "comfyui").mkdir(exist_ok=True)
    save_file({name: 2 * tensor for name, tensor in load_file(folder / LORA).items()}, folder / COMFY)
    (folder / "README.md").write_text(CARD.format(student=str(folder)))
    return folder


@dataclass(frozen=True)
class Visit:
    """What a visit left: its folder, what was printed, its record, and what the student was before it."""

    folder: Path
    printed: str
    record: Mapping[str, Any]
    before: Mapping[str, str]


@pytest.fixture(scope="module")
def visited(tiny_student: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Visit:
    folder = tmp_path_factory.mktemp("visit")
    student = fill(folder / "the student", tiny_student)
    before = digests(student)
    words = [sys.executable, "-c", VISIT, str(student), str(prompts_file), str(folder)]
    environment = visitor_environment(folder / "home", HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return Visit(folder, done.stdout + done.stderr, json.loads((folder / "record.json").read_text()), before)


def test_ctrl_c_ends_a_push_with_the_command_to_try_again(tiny_student: Path, tmp_path: Path) -> None:
    with HubServer({}, {}, {TOKEN: "me"}) as hub:
        hub.fail(r"POST .*/commit/", SILENCE, 99)
        environment = visitor_environment(tmp_path, HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
        words = [sys.executable, "-c", PUSH, str(tiny_student), "me/x"]
        process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not any("/commit/" in line for line in hub.log):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert said.splitlines()[-1] == (
        f"The push to me/x was not completed (interrupted); {AGAIN}rdm-push {tiny_student} me/x"
    )


def test_what_is_for_others_goes_up_byte_for_byte_and_nothing_else(visited: Visit) -> None:
    assert visited.record["first"]["said"] == ""
    files = visited.record["me/first"]["files"]["main"]
    assert set(files) == GOES_UP | {".gitattributes"}
    assert {path: files[path] for path in GOES_UP - {"README.md"}} == {
        path: visited.before[path] for path in GOES_UP - {"README.md"}
    }


def test_the_card_that_goes_up_names_the_repository_and_the_local_one_the_folder(visited: Visit) -> None:
    files = visited.record["me/first"]["files"]["main"]
    assert files["README.md"] == sha256(CARD.format(student="me/first").replace("'me/first'", '"me/first"').encode())
    assert visited.record["untouched"]


def test_a_second_push_without_a_change_makes_no_commit_and_sends_nothing(visited: Visit) -> None:
    assert visited.record["again"]["said"] == ""
    assert not [line for line in visited.record["again"]["log"] if line.startswith("PUT") or "/commit/" in line]
    assert len(visited.record["me/first"]["messages"]) == 2


def test_a_private_push_to_a_branch_has_its_message_and_its_tag(visited: Visit) -> None:
    assert visited.record["second"]["said"] == visited.record["second again"]["said"] == ""
    found = visited.record["me/second"]
    assert found["private"]
    assert set(found["files"]["turbo/v2"]) == GOES_UP | {".gitattributes"}
    assert set(found["files"]["main"]) == {".gitattributes"}
    assert found["tags"] == {"v1": found["branches"]["turbo/v2"]}
    assert found["messages"][found["tags"]["v1"]] == "it's 'better'"


@pytest.mark.parametrize("what", ["trouble that passes", "cut that passes"])
def test_what_passes_is_waited_for(visited: Visit, what: str) -> None:
    assert visited.record[what]["said"] == ""


FAILURES = {
    "tag taken": "the commit is there, but the tag v1 means another one; choose another --tag",
    "trouble that stays": 'the Hub answered 503 "This was ordered"',
    "trouble at the end": 'the Hub answered 500 "This was ordered"',
    "silence": "the Hub did not answer in time",
    "cut": "the connection to the Hub failed: ",
    "cut answer": "the connection to the Hub failed: ",
    "unauthorised": 'the Hub answered 401 "This was ordered": log in again with `hf auth login`',
    "forbidden": 'the Hub answered 403 "This was ordered": make a token that may write there',
    "conflict": 'the Hub answered 409 "This was ordered"',
    "unknown token": "401",
    "other's": "403",
    "reader": "403",
    "half": 'the Hub answered 500 "This was ordered"',
    "nobody there": "the connection to the Hub failed: [Errno 111] Connection refused",
    "trained in vain": "500",
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_push_that_fails_says_why_in_one_sentence_that_ends_with_the_command_to_try_again(
    visited: Visit, what: str
) -> None:
    said = visited.record[what]["said"]
    assert FAILURES[what] in said
    assert "\n" not in said and ". " not in said
    words = shlex.split(said.split(AGAIN)[1])
    assert words[0] == "rdm-push" and Path(words[1]).is_dir()
    assert command.make_parser().parse_args(words[1:]).token is None


def test_files_stay_when_a_push_fails(visited: Visit) -> None:
    assert visited.record["still there"]
    assert visited.record["half untouched"]


def test_the_command_to_try_again_sends_only_what_has_not_arrived(visited: Visit) -> None:
    first, second = (
        [line for line in visited.record[what]["log"] if line.startswith("PUT")] for what in ("half", "other half")
    )
    assert len(set(first)) == 2 and len(second) == 1
    found = visited.record["me/half"]
    assert set(found["files"]["main"]) == GOES_UP | {".gitattributes"}
    assert found["messages"][found["branches"]["main"]] == "$HOME `it's`"


def test_a_check_makes_the_repository_and_its_branch_and_tells_its_full_name(visited: Visit) -> None:
    assert visited.record["checked"] == ["", "me/checked"]
    assert visited.record["me/checked"]["private"]
    assert set(visited.record["me/checked"]["files"]) == {"main", "next"}
    assert set(visited.record["me/checked"]["files"]["next"]) == {".gitattributes"}


@pytest.mark.parametrize(
    ("what", "error", "reason"),
    [
        ("check of a bad name", "ValueError", "'me/my student' is no name of a repository; give NAME or USER/NAME"),
        ("check without a token", "PushError", "there is no token; log in with `hf auth login` or set HF_TOKEN"),
        ("check with an unknown token", "PushError", "401"),
        ("check of another's name", "PushError", "403"),
        ("check of a reader", "PushError", "403"),
        ("check of a public name", "PushError", "the repository is public; make it private in its settings"),
        ("check of a silent Hub", "PushError", "the Hub did not answer in time"),
        ("check of a broken Hub", "PushError", "the Hub answered 502"),
    ],
)
def test_a_check_says_in_one_sentence_why_nothing_can_be_pushed(
    visited: Visit, what: str, error: str, reason: str
) -> None:
    kind, said = visited.record[what]
    assert kind == error and reason in said
    assert said.endswith(".") and "\n" not in said and ". " not in said


def test_a_full_disk_at_download_is_called_so_and_a_later_download_is_whole(visited: Visit, tiny_student: Path) -> None:
    kind, said = visited.record["full disk"]
    assert kind == "OSError" and "File too large" in said
    full = "The student 'me/first' does not fit on the disk; free some space and load it again."
    assert visited.record["full disk, loading"] == ["ValueError", full]
    downloaded = dict(visited.record["downloaded"])
    assert downloaded == visited.record["me/first"]["files"]["main"]
    pipeline = RdmDistillationPipeline.from_pretrained(tiny_student)
    picture = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(torch.load(visited.folder / "picture.pt", weights_only=True), picture)


def test_a_pipeline_that_is_saved_and_pushed_as_diffusers_does_is_a_whole_student(visited: Visit) -> None:
    assert visited.record["saved"] == ["", "None"]
    files = set(visited.record["saved files"])
    assert {"rdm_config.json", "model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= files


def test_of_the_student_that_was_there_nothing_stays_and_of_the_users_files_all(visited: Visit) -> None:
    assert [visited.record[what]["said"] for what in ("replaced", "renamed", "to nothing")] == [""] * 3
    files = visited.record["me/saved"]["files"]
    assert set(files["main"]) == GOES_UP | set(OWN) | {".gitattributes"}
    assert set(files["next"]) == GOES_UP - {COMFY} | {"comfyui/renamed.safetensors", *OWN, ".gitattributes"}
    assert set(visited.record["me/empty"]["files"]["main"]) == GOES_UP


def test_private_and_gated_students_open_to_those_who_may(visited: Visit) -> None:
    assert visited.record["private"][0] == "RepositoryNotFoundError"
    assert visited.record["its owner"][0] == ""
    assert visited.record["gated"][0] == "GatedRepoError"


def test_a_run_pushes_its_student_last_and_privately_under_the_folders_name(visited: Visit) -> None:
    assert visited.record["trained"]["said"] == ""
    found = visited.record["me/trained"]
    assert found["private"]
    assert set(found["files"]["main"]) == GOES_UP - {COMFY} | {"comfyui/trained.safetensors", ".gitattributes"}
    for name in ("trained", "trained-in-vain"):
        assert set(digests(visited.folder / name)) >= GOES_UP - {COMFY}


def test_a_push_of_checkpoints_that_failed_goes_on_where_it_was(visited: Visit) -> None:
    said = visited.record["half tagged"]["said"]
    assert shlex.split(said.split(AGAIN)[1])[-3:] == ["--tag_checkpoints", "--tag", "final"]
    assert visited.record["tagged"]["said"] == ""
    found = visited.record["me/tagged"]
    names = {tag: found["messages"][commit] for tag, commit in found["tags"].items()}
    assert names == {"checkpoint-1": "checkpoint-1", "checkpoint-2": "checkpoint-2", "final": push.COMMIT_MESSAGE}
    assert not list((visited.folder / "trained").glob(".export-*"))
    assert visited.printed.count("another run's; not pushed: checkpoint-1, checkpoint-2.\n") == 1


def test_the_token_of_a_push_opens_the_private_base_of_its_checkpoints(visited: Visit) -> None:
    assert visited.record["private base"]["said"] == ""


def test_no_token_is_printed_written_or_uploaded(visited: Visit) -> None:
    files = [path for path in visited.folder.rglob("*") if path.is_file()]
    assert len(files) > 40
    assert [path for path in files if b"recognisable" in path.read_bytes()] == []
    assert "recognisable" not in visited.printed
    uploads, leaks = visited.record["uploads"]
    assert uploads > 50 and leaks == 0


def test_the_files_of_a_whole_pipeline_are_those_of_its_components(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    up = ("model_index.json", "rdm_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
          "tokenizer/merges.txt", "tokenizer/spiece.model", "tokenizer/chat_template.jinja")  # fmt: skip
    stays = ("unet/diffusion_pytorch_model.bin", "unet/.secret.json", "vae/config.json", "checkpoint-5/state.json",
             "../outside.json", "tokenizer/model.pkl")  # fmt: skip
    folder = tmp_path / "student"
    for path in (*up, *stays):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("{}")
    others = {"tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None], "..": ["a", "b"]}
    (folder / "model_index.json").write_text(json.dumps({**index, **others}))
    assert {file.relative_to(folder).as_posix() for file in student_files(folder)} == set(up)


@pytest.mark.parametrize("name", ["metrics.json", "README.md", LORA])
@pytest.mark.parametrize("secret", [TOKEN, "another secret"])
def test_a_file_with_a_token_in_it_is_named_and_the_token_is_not(
    tiny_student: Path, tmp_path: Path, name: str, secret: str
) -> None:
    folder = fill(tmp_path / "student", tiny_student)
    if name == LORA:
        save_file(load_file(folder / name), folder / name, metadata={"made_by": secret})
    else:
        (folder / name).write_text(f"made by {secret}")
    with pytest.raises(ValueError) as caught:
        push.push_student(folder, "me/x", token="another secret")
    assert str(caught.value).startswith(f"{folder / name} holds what looks like an access token")
    assert secret not in str(caught.value)


@pytest.mark.parametrize("changed", ["base_model_name_or_path", "vae"])
def test_a_lora_that_needs_a_folder_of_this_machine_is_not_pushed(
    tiny_student: Path, teacher_folder: Path, tmp_path: Path, changed: str
) -> None:
    folder = fill(tmp_path / "student", tiny_student)
    config = json.loads((folder / "rdm_config.json").read_text())
    (folder / "rdm_config.json").write_text(json.dumps(config | {changed: str(teacher_folder)}))
    with pytest.raises(ValueError, match=f"needs {teacher_folder}, a folder that others do not have; train it from"):
        push.push_student(folder, "me/x", token=TOKEN)


@pytest.mark.parametrize("name", ["scheduler", LORA, COMFY])
def test_an_incomplete_lora_is_not_pushed(tiny_student: Path, tmp_path: Path, name: str) -> None:
    folder = fill(tmp_path / "student", tiny_student)
    if name == "scheduler":
        shutil.rmtree(folder / name)
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    what = r"scheduler/scheduler_config.json is missing" if name == "scheduler" else rf"{name} is damaged \(.*\)"
    with pytest.raises(ValueError, match=f"^{folder}/{what}; download or export the student again\\.$"):
        push.push_student(folder, "me/x", token=TOKEN)


def test_a_whole_pipeline_without_a_component_is_not_pushed(tiny_student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    RdmDistillationPipeline.from_pretrained(tiny_student).save_pretrained(folder)
    assert push.check_student(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match=f"^{folder}/vae is missing; download or export the student again\\.$"):
        push.push_student(folder, "me/x", token=TOKEN)


def test_a_folder_without_a_student_is_not_pushed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no student; give the --output_dir of a finished training run"):
        push.push_student(tmp_path, "me/x", token=TOKEN)


def test_a_folders_name_that_no_repository_can_have_is_refused_before_a_run() -> None:
    sentence = r"^--output_dir gives the repository the name 'bad name ü', .*; give another with --hub_model_id\.$"
    with pytest.raises(ValueError, match=sentence):
        repository(RunConfig.of(output_dir="runs/bad name ü"))
    assert repository(RunConfig.of(output_dir="bad name ü", hub_model_id="me/good")) == "me/good"


def test_a_push_without_the_network_says_so(tiny_student: Path) -> None:
    with pytest.raises(push.PushError, match=r"HF_HUB_OFFLINE forbids reaching the Hub; unset it.*rdm-push /.* me/x$"):
        push.push_student(tiny_student, "me/x", token=TOKEN)
