"""A visit to a Hub on this machine, by a process that knows it under HF_ENDPOINT from its start; see test_push.py."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import huggingface_hub
import torch
from hub_repositories import CUT, SILENCE, Fault, Repository, read_folder, sha256
from hub_server import HubServer
from huggingface_hub import snapshot_download
from parts import PROMPTS, files_of_at_most, run_arguments
from safetensors.torch import load_file, save_file

import train_rdm_lora
from rdm_diffusers import RdmDistillationPipeline
from rdm_diffusers.commands import push as command
from rdm_diffusers.hub import check_push, push
from rdm_diffusers.tiny import TINY_TEACHER

TOKEN, READER = "hf_recognisableSecret0123456789", "hf_recognisableReader0123456789"
LORA, COMFY = "pytorch_lora_weights.safetensors", "comfyui/student.safetensors"
OWN = ("LICENSE", "notes.md", "unet/notes.md", "unet/old.bin", "vae/.keep.json", "pictures/mine.jpg", "mine/a.json")
AGAIN = "the folder is untouched, try again with: "


def digests(folder: Path) -> dict[str, str]:
    """What a local folder holds."""
    return {str(f.relative_to(folder)): sha256(f.read_bytes()) for f in sorted(folder.rglob("*")) if f.is_file()}


class Visitor:
    """Pushes a student again and again, and keeps what came of it, by the name of what was tried."""

    def __init__(self, hub: HubServer, student: Path) -> None:
        self.hub, self.student = hub, student
        self.record: dict[str, Any] = {}

    def push(self, what: str, *words: str, token: str = TOKEN) -> str:
        """`rdm-push` as a user calls it, and what it says as it fails."""
        asked, sys.argv = len(self.hub.log), ["rdm-push", *words, "--hub_token", token]
        said = ""
        try:
            with patch.dict(os.environ):  # a process of its own would forget the token
                command.run()
        except SystemExit as error:
            said = str(error.code)
        self.record[what] = {"said": said, "log": self.hub.log[asked:]}
        return said

    def push_with(self, what: str, pattern: str, fault: int | str, times: int = 99) -> None:
        """A push of something new to a new repository, in the course of which something goes wrong."""
        self.change(what)
        self.hub.fail(pattern, fault, times)
        self.push(what, str(self.student), f"me/{what.replace(' ', '-')}")
        self.hub.faults.clear()

    def change(self, what: str) -> None:
        """Other weights than any before."""
        number = int(hashlib.sha1(what.encode()).hexdigest()[:4], 16)
        for i, name in enumerate((LORA, COMFY)):
            tensors = load_file(self.student / name)
            changed = {key: torch.full_like(tensor, number + i / 2) for key, tensor in tensors.items()}
            save_file(changed, self.student / name)

    def call(self, what: str, function: Callable[..., object], *args: object, **options: object) -> None:
        """What a function returns, or its error's class and message."""
        try:
            self.record[what] = ["", str(function(*args, **options))]
        except Exception as error:
            self.record[what] = [type(error).__name__, str(error)]

    def repository(self, name: str) -> Repository:
        return self.hub.repositories[name]

    def show(self, name: str) -> None:
        """Keeps a repository's state."""
        found = self.repository(name)
        self.record[name] = {
            "private": found.private,
            "branches": dict(found.branches),
            "tags": dict(found.tags),
            "messages": {oid: commit.message for oid, commit in found.commits.items()},
            "files": {branch: {path: sha256(body) for path, body in found.at(branch).files.items()}
                      for branch in found.branches},
        }  # fmt: skip


def visit(hub: HubServer, student: Path, prompts_file: Path, folder: Path) -> None:
    """All that is tested here."""
    huggingface_hub.utils._http.time = SimpleNamespace(sleep=lambda seconds: None)  # it waits longer and longer
    push.PATIENCE = 0.5
    visitor = Visitor(hub, student)
    before = digests(student)
    push_in_peace(visitor)
    visitor.record["untouched"] = digests(student) == before
    check(visitor)
    download(visitor, folder)
    replace(visitor, folder)
    push_under_fire(visitor)
    train(visitor, prompts_file, folder)
    uploads = [body for found in hub.repositories.values() for commit in found.commits.values()
               for body in commit.files.values()]  # fmt: skip
    visitor.record["uploads"] = [len(uploads), sum(b"recognisable" in body for body in uploads)]
    hub.shutdown()
    hub.server_close()
    huggingface_hub.close_session()  # which would go on over a connection that is open
    visitor.push("nobody there", str(student), "me/nobody")
    (folder / "record.json").write_text(json.dumps(visitor.record))


def push_in_peace(visitor: Visitor) -> None:
    """To a Hub that works."""
    student = str(visitor.student)
    visitor.push("first", student, "me/first")
    visitor.push("again", student, "me/first")
    visitor.show("me/first")
    words = (student, "second", "--private", "--revision", "turbo/v2", "--commit_message", "it's 'better'")
    visitor.push("second", *words, "--tag", "v1")
    visitor.push("second again", *words, "--tag", "v1")
    visitor.show("me/second")


def replace(visitor: Visitor, folder: Path) -> None:
    """A LoRA where a whole pipeline was, then one by another name; to repositories with a user's own files in them."""
    own = {name: b"mine" for name in OWN}
    visitor.repository("me/saved").add("main", own, "a user's own files")
    visitor.push("replaced", str(visitor.student), "me/saved")
    visitor.show("me/saved")
    renamed = shutil.copytree(visitor.student, folder / "renamed")
    (renamed / COMFY).rename(renamed / "comfyui" / "renamed.safetensors")
    visitor.push("renamed", str(renamed), "me/saved", "--revision", "next")
    visitor.show("me/saved")
    visitor.hub.make("me/empty").add("main", {}, "the first")
    visitor.push("to nothing", str(visitor.student), "me/empty")
    visitor.show("me/empty")


def push_under_fire(visitor: Visitor) -> None:
    """To a Hub that does not work; every time new weights to a new repository."""
    visitor.change("the tag's second commit")
    visitor.push("tag taken", str(visitor.student), "me/second", "--revision", "turbo/v2", "--tag", "v1")
    before = digests(visitor.student)
    visitor.push_with("trouble that passes", "PUT", 500, 2)
    visitor.push_with("cut that passes", "PUT", CUT, 2)
    visitor.push_with("trouble that stays", "preupload", 503)
    visitor.push_with("trouble at the end", r"POST .*/commit/", 500)
    visitor.push_with("silence", r"POST .*/commit/", SILENCE)
    visitor.push_with("cut", "PUT", CUT)
    visitor.push_with("cut answer", r"POST .*/commit/", CUT)
    visitor.push_with("unauthorised", r"POST .*/commit/", 401)
    visitor.push_with("forbidden", "PUT", 403)
    visitor.push_with("conflict", r"POST .*/commit/", 409)
    visitor.record["still there"] = set(digests(visitor.student)) == set(before)
    visitor.push("unknown token", str(visitor.student), "me/unknown", token="hf_unknown")
    visitor.push("other's", str(visitor.student), "you/other")
    visitor.push("reader", str(visitor.student), "me/first", token=READER)
    visitor.change("half of it arrives")
    half = f"PUT /large-files/{sha256((visitor.student / LORA).read_bytes())}"
    visitor.hub.fail(half, 500, 99)
    before = digests(visitor.student)
    said = visitor.push("half", str(visitor.student), "me/half", "--commit_message", "$HOME `it's`")
    visitor.hub.faults.clear()
    visitor.push("other half", *shlex.split(said.split(AGAIN)[1])[1:])
    visitor.record["half untouched"] = digests(visitor.student) == before
    visitor.show("me/half")


def check(visitor: Visitor) -> None:
    """Before a run."""
    visitor.call("checked", check_push, "checked", token=TOKEN, private=True, revision="next")
    visitor.show("me/checked")
    visitor.call("check of a bad name", check_push, "me/my student", token=TOKEN)
    visitor.call("check without a token", check_push, "me/x")
    visitor.call("check with an unknown token", check_push, "me/x", token="hf_unknown")
    visitor.call("check of another's name", check_push, "you/x", token=TOKEN)
    visitor.call("check of a reader", check_push, "me/first", token=READER)
    visitor.call("check of a public name", check_push, "me/first", token=TOKEN, private=True)
    visitor.hub.fail("repos/create", SILENCE, 1)
    visitor.call("check of a silent Hub", check_push, "me/x", token=TOKEN)
    visitor.hub.fail("repos/create", 502, 1)
    visitor.call("check of a broken Hub", check_push, "me/x", token=TOKEN)


def download(visitor: Visitor, folder: Path) -> None:
    """By those who find the student."""
    weights = {name: (visitor.student / name).stat().st_size for name in (LORA, COMFY)}
    with files_of_at_most(min(weights.values()) // 2):
        visitor.call("full disk", snapshot_download, "me/first")
        visitor.call("full disk, loading", RdmDistillationPipeline.from_pretrained, "me/first", cache_dir=folder / "c")
    visitor.hub.fail(f"GET .*{LORA}", CUT)
    visitor.hub.faults.append(Fault(f"GET .*{COMFY}", SILENCE, 1))
    visitor.call("interrupted", snapshot_download, "me/first")  # not every huggingface_hub goes on by itself
    visitor.call("space again", snapshot_download, "me/first")
    visitor.record["downloaded"] = digests(Path(visitor.record["space again"][1]))
    pipeline = RdmDistillationPipeline.from_pretrained("me/first", cache_dir=folder / "c")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    torch.save(pipeline(PROMPTS[0], generator=generator, output_type="pt").images, folder / "picture.pt")
    visitor.call("saved", pipeline.save_pretrained, folder / "saved", push_to_hub=True, repo_id="me/saved", token=TOKEN)
    visitor.record["saved files"] = sorted(visitor.repository("me/saved").at("main").files)
    visitor.call("private", snapshot_download, "me/second")
    visitor.call("its owner", snapshot_download, "me/second", revision="v1", token=TOKEN)
    visitor.repository("me/first").gated = True
    visitor.call("gated", snapshot_download, "me/first", cache_dir=folder / "cache")
    visitor.repository("me/first").gated = False


def train(visitor: Visitor, prompts_file: Path, folder: Path) -> None:
    """Runs that end with a push."""
    hub = {"push_to_hub": True, "hub_token": TOKEN, "hub_private_repo": True, "report_to": "tensorboard"}
    for what, fault in ("trained", None), ("trained in vain", 500):
        if fault:
            visitor.hub.fail(r"POST .*/commit/", fault)
        run = folder / what.replace(" ", "-")
        asked = len(visitor.hub.log)
        try:
            options = {**hub, "steps_per_rollout": 2, "checkpointing_steps": 1}
            with patch.dict(os.environ):
                train_rdm_lora.main(run_arguments("tiny", prompts_file, run, **options))
            said = ""
        except (ValueError, OSError) as error:
            said = str(error)
        visitor.record[what] = {"said": said, "log": visitor.hub.log[asked:]}
        visitor.hub.faults.clear()
    visitor.show("me/trained")
    visitor.hub.fail(r"POST .*/tag/", 500)
    said = visitor.push("half tagged", str(folder / "trained"), "me/tagged", "--tag_checkpoints", "--tag", "final")
    visitor.push("tagged", *shlex.split(said.split(AGAIN)[1])[1:])
    visitor.show("me/tagged")
    visitor.push("tagged again", str(folder / "trained"), "me/tagged", "--tag_checkpoints")
    visitor.hub.make("me/base", private=True).add("main", read_folder(Path(TINY_TEACHER)), "the first")
    run = shutil.copytree(folder / "trained", folder / "of-private-base")
    for record in run / "rdm_config.json", *run.glob("checkpoint-*/state.json"):
        text = re.sub(r'(model_name_or_path": )"tiny"', r'\1"me/base"', record.read_text())
        record.write_text(re.sub(r',\s*"digest": "\w+"', "", text))  # a record of 0.1.0 has none
    visitor.push("private base", str(run), "me/of-private-base", "--tag_checkpoints")
