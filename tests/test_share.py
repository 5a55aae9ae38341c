"""A student goes from one machine to another: trained and pushed by one process, found on the Hub by others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_repositories import Repository
from hub_server import HubServer, visitor_environment
from parts import PROMPTS, run_arguments
from PIL import Image
from safetensors.torch import load
from share_visit import FULL, STUDENT
from torch import Tensor

from rdm_diffusers.evaluation.pictures import LABEL_HEIGHT
from rdm_diffusers.tiny import TINY_TEACHER

TOKEN = "hf_recognisableSecret0123456789"
SHOWN = list(PROMPTS[:3])
ROUNDING = 1.01 / 255  # of a picture in 8 bits
TRAIN = """
import json, sys, train_rdm_full, train_rdm_lora
lora, full = json.loads(sys.argv[1])
train_rdm_lora.main(lora)
train_rdm_full.main(full)
"""


@dataclass(frozen=True)
class Shared:
    """What the processes left: the trainers' folder, the Hub's repositories, and the pictures that were drawn."""

    folder: Path
    repositories: Mapping[str, Repository]
    drawn: Mapping[str, Tensor]
    offline: Mapping[str, Tensor]

    def trained(self, name: str = "tiny-student") -> Tensor:
        """The student's pictures `[N, 3, 32, 32]` that its run drew at its end."""
        files = [self.folder / name / "pictures" / f"{i}.png" for i in range(len(SHOWN))]
        return torch.stack([as_tensor(Image.open(file)) for file in files])


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def run(command: list[str], environment: dict[str, str], folder: Path) -> None:
    """A process of its own; the token is nowhere in what it prints."""
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def shared(prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("shared")
    visit = [sys.executable, str(Path(__file__).parent / "share_visit.py")]
    wanted = {"prompts": SHOWN, "teacher": TINY_TEACHER, "token": TOKEN}
    with HubServer({}, {}, {TOKEN: "me"}) as hub:
        environment = visitor_environment(folder / "trainer", HF_ENDPOINT=hub.address)
        options: dict = dict(
            validation_prompt=SHOWN, num_validation_images=3, validation_steps=1, steps_per_rollout=2,
            push_to_hub=True, hub_token=TOKEN,
        )  # fmt: skip
        tagged = {"checkpointing_steps": 1, "hub_tag_checkpoints": True, "report_to": "tensorboard"}
        private = {"rank": None, "hub_private_repo": True}
        words = [
            run_arguments("tiny", prompts_file, folder / name.split("/")[1], **options, **more)
            for name, more in ((STUDENT, tagged), (FULL, private))
        ]
        run([sys.executable, "-c", TRAIN, json.dumps(words)], environment, folder)
        environment = visitor_environment(folder / "visitor", HF_ENDPOINT=hub.address)
        run([*visit, "visit", str(folder), json.dumps(wanted)], environment, folder)
    offline = {**environment, "HF_HUB_OFFLINE": "1"}  # and the server is gone
    run([*visit, "offline", str(folder), json.dumps(wanted)], offline, folder)
    drawn = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("visit", "offline")}
    return Shared(folder, hub.repositories, drawn["visit"], drawn["offline"])


@pytest.mark.parametrize("who", ["ours", "stock", "comfyui"])
def test_a_lora_from_the_hub_draws_the_very_pictures_of_its_run(shared: Shared, who: str) -> None:
    assert float((shared.drawn[who] - shared.trained()).abs().max()) <= ROUNDING
    assert float((shared.drawn[who] - shared.drawn["ours"]).abs().max()) <= 1e-5


@pytest.mark.parametrize("who", ["ours full", "stock full", "auto full"])
def test_a_full_student_from_the_hub_draws_the_very_pictures_of_its_run(shared: Shared, who: str) -> None:
    assert float((shared.drawn[who] - shared.trained("tiny-full")).abs().max()) <= ROUNDING
    assert float((shared.drawn[who] - shared.drawn["ours full"]).abs().max()) <= 1e-5


def test_a_student_from_the_hub_draws_what_the_trainer_saw_as_it_trained(shared: Shared) -> None:
    picture = as_tensor(Image.open(shared.folder / "tiny-student" / "validation" / "step-2.png"))
    seen = picture[:, LABEL_HEIGHT::3, ::3]  # a row, three times as large
    assert float((torch.cat(list(shared.drawn["validation"]), dim=2) - seen).abs().max()) <= ROUNDING


def test_without_a_network_the_same_comes_from_the_cache(shared: Shared) -> None:
    for name, pictures in shared.offline.items():
        assert torch.equal(pictures, shared.drawn[name])


def test_every_checkpoint_has_a_tag_and_is_a_student_of_its_own(shared: Shared) -> None:
    repository = shared.repositories[STUDENT]
    assert set(repository.tags) == {"checkpoint-1", "checkpoint-2"}
    assert [commit.message for commit in repository.commits.values()][-3:] == [
        "checkpoint-1", "checkpoint-2", "End of training",
    ]  # fmt: skip
    weights = {name: load(repository.at(name).files["pytorch_lora_weights.safetensors"]) for name in repository.tags}
    last = load(repository.at("main").files["pytorch_lora_weights.safetensors"])
    assert all(torch.equal(last[name], tensor) for name, tensor in weights["checkpoint-2"].items())
    assert any(not torch.equal(last[name], tensor) for name, tensor in weights["checkpoint-1"].items())
    assert float((shared.drawn["earlier"] - shared.drawn["ours"]).abs().max()) > 1e-3


def test_the_cards_on_the_hub_load_the_student_from_there(shared: Shared) -> None:
    for name in (STUDENT, FULL):
        card = shared.repositories[name].at("main").files["README.md"].decode()
        assert card.count(f'\nstudent = "{name}"\n') == 2
        assert str(shared.folder) not in card


def test_no_file_of_the_run_holds_the_token_and_none_of_the_hub_names_a_folder(shared: Shared) -> None:
    kept = [path for path in shared.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(kept) > 60
    assert [path for path in kept if TOKEN.encode() in path.read_bytes()] == []
    uploaded = [
        body
        for repository in shared.repositories.values()
        for commit in repository.commits.values()
        for body in commit.files.values()
    ]
    assert len(uploaded) > 30
    assert not any(TOKEN.encode() in body or str(shared.folder).encode() in body for body in uploaded)
