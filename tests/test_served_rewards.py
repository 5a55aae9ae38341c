"""Rewards of another process: the server in docs/rewards.md, how batches are sent, and what is said if none answers."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import read_state, run_arguments
from parts_processes import free_port
from PIL import Image
from urllib3.util.retry import Retry

import train_rdm_lora
from rdm_diffusers.rewards import evaluate, load_reward, served

ROOT = Path(__file__).parents[1]
GOOD = {"scores": [0.5]}
GREY = "a grey picture"


class Server(ThreadingHTTPServer):
    """Gives its `answers` one after the other, the last one for ever; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, object]] = [(200, GOOD)]
        self.asked: list[dict] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/score"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status, answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(served, "RETRIES", served.RETRIES.new(backoff_factor=0))
    with Server() as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield it
        it.shutdown()


def pictures(png: list[str]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in png]


@pytest.fixture
def documented(tmp_path: Path) -> Iterator[str]:
    """The address of the server that docs/rewards.md shows, in a process of its own."""
    code = re.search(r"```python\n(# serve_reward\.py\n.*?)```", (ROOT / "docs" / "rewards.md").read_text(), re.S)
    assert code is not None
    port = free_port()
    (tmp_path / "serve_reward.py").write_text(code[1].replace("8000", str(port)))
    with subprocess.Popen([sys.executable, tmp_path / "serve_reward.py"], stderr=subprocess.DEVNULL) as process:
        yield f"http://127.0.0.1:{port}/redness"
        process.kill()


def test_a_run_is_rewarded_by_the_server_that_the_documentation_shows(
    documented: str, teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    weighted = load_reward(f"{documented}:0.5", "cpu")
    assert weighted.weight == 0.5 and not weighted.reward.differentiable
    images = torch.rand(3, 3, 8, 8)
    scores = evaluate(weighted.reward, images, ["a", "b", "c"])
    exact = (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))
    assert torch.allclose(scores, exact, atol=1 / 255)
    words = dict(algorithm="gndmr", checkpointing_steps=2)
    (tmp_path / "own.py").write_text(
        "def redness(images, prompts):\n"
        "    images = (images * 255).round() / 255\n"
        "    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))\n"
    )
    for folder, reward in (("served", documented), ("own", f"{tmp_path / 'own.py'}:redness")):
        train_rdm_lora.main(run_arguments(teacher_folder, prompts_file, tmp_path / folder, reward=reward, **words))
    one, other = (read_state(tmp_path / folder / "checkpoint-2") for folder in ("served", "own"))
    names = [name for name in one if name.startswith("student/parameter/")]
    assert names and all(torch.allclose(one[name], other[name], atol=1e-5) for name in names)


def test_a_batch_is_one_question_with_png_files_and_null_is_no_score(server: Server) -> None:
    reward = load_reward(server.address, "cpu").reward
    assert server.asked.pop()["prompts"] == [GREY]
    server.answers = [(200, {"scores": [1, None, -2.5]})]
    images = torch.rand(3, 3, 8, 16)
    scores = evaluate(reward, images, ["one", "two", "drei ä"])
    (asked,) = server.asked
    assert asked.keys() == {"images", "prompts"} and asked["prompts"] == ["one", "two", "drei ä"]
    sent = torch.stack([torch.from_numpy(each.copy()) for each in pictures(asked["images"])]).permute(0, 3, 1, 2) / 255
    assert torch.allclose(sent, images, atol=0.5 / 255 + 1e-6)
    assert scores.tolist()[::2] == [1, -2.5] and scores[1].isnan()


def test_a_reward_is_called_by_its_address(server: Server) -> None:
    assert load_reward(server.address, "cpu").reward.name == f"127_0_0_1_{server.server_port}_v1_score"


def test_a_server_that_is_busy_is_asked_again(server: Server) -> None:
    server.answers = [(503, {}), (429, {}), (200, GOOD)]
    assert evaluate(load_reward(server.address, "cpu").reward, torch.rand(1, 3, 8, 8), ["x"]).tolist() == [0.5]
    assert [each["prompts"] for each in server.asked] == [[GREY]] * 3 + [["x"]]


def test_the_waits_for_a_server_add_up_to_what_the_documentation_says() -> None:
    retry: Retry = served.RETRIES
    waits = []
    while retry.total:
        retry = retry.increment("POST", "/", error=ConnectionError())
        waits.append(retry.get_backoff_time())
    assert len(waits) == 4 and sum(waits) == 7


@pytest.mark.parametrize(
    "answer, said",
    [
        ((500, {}), "answers 500 Internal Server Error; start it, or mend it or the address."),
        ((302, {}), "answers 302 Found; start it"),
        ((200, {"scores": [1, 2]}), 'does not answer 1 images with {"scores": [...]}, a number or null for each'),
        ((200, {"scores": []}), "does not answer 1 images"),
        ((200, {"scores": ["high"]}), "does not answer 1 images"),
        ((200, {"scores": [True]}), "does not answer 1 images"),
        ((200, {"score": [1]}), "does not answer 1 images"),
        ((200, [1]), "does not answer 1 images"),
        ((200, b"fine"), "does not answer 1 images"),
    ],
    ids=str,
)
def test_an_answer_that_is_none_ends_the_run_before_it_begins(server: Server, answer: tuple, said: str) -> None:
    server.answers = [answer]
    with pytest.raises(ValueError, match=re.escape(said)):
        load_reward(server.address, "cpu")


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "RETRIES", served.RETRIES.new(backoff_factor=0))
    address = f"http://127.0.0.1:{free_port()}/score"
    with pytest.raises(ValueError, match=rf"^The reward server {address} does not answer \(.*refused.*\); start it"):
        load_reward(address, "cpu")


@pytest.mark.parametrize(
    "spec, said",
    [
        ("http://", "cannot be read; write http://host:port/path"),
        ("http://host:8000:0.5", "cannot be read; write http://host:port/path, and behind it :weight."),
        ("http://me:hidden@host:8000:0.5/score", "cannot be read; write http://host:port/path"),
        ("http://:hidden@host/score", "no user, no query and no fragment.*; write http://host/score."),
        ("http://host:8000/score:much", "The weight 'much' in --reward"),
        ("http://host:8000/score:0", "must be finite and not 0"),
        ("http://me:hidden@host:8000/score", "no user, no query and no fragment.*; write http://host:8000/score."),
        ("https://host/score?key=hidden", "no user, no query and no fragment.*; write https://host/score."),
    ],
)
def test_an_address_that_cannot_be_right_is_refused_without_its_secrets(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        load_reward(spec, "cpu")
    assert "hidden" not in str(refused.value)
