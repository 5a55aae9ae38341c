"""Passwords and tokens: refused on a command line without being shown, and taken out of what is recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rdm_diffusers.config import RunConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.config.record import command_line, training_record
from rdm_diffusers.config.secrecy import launch_words, problem
from rdm_diffusers.hub.student_files import check_secrets
from rdm_diffusers.untrusted import has_secret, without_secrets

ROOT = Path(__file__).parents[1]
TOKEN = "hf_recognisableSecret0123456789"
SECRETS = {
    "https://me:hunter2@host.org/x.txt": "https://host.org/x.txt",
    "see http://hunter2@host.org and more": "see http://host.org and more",
    "s3://a:hun@ter2@bucket/p": "s3://bucket/p",
    "https://host.org/x?token=hunter2&b=1": "https://host.org/x?b=1",
    "https://host.org/x?a=1&X-Amz-Signature=hunter2": "https://host.org/x?a=1&",
    "https://host.org/x#access_token=hunter2": "https://host.org/x#",
    "https://host.org/x?API_KEY=hunter2": "https://host.org/x?",
    f"name={TOKEN}:2": "name=...:2",
}
HARMLESS = ("tiny", "owner/model", "https://host.org/a?author=me&page=2", "/imagine a=b/c", "me@host.org", "hf_model",
            "https://x.com/@me", "path/to/file.py:function:0.5", "a key=value pair", "C:\\x:y@z")  # fmt: skip
FLAGS = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "dataset_name", "prompts_file",
         "cache_dir", "reward", "validation_prompt", "tracker_project_name", "output_dir", "hub_model_id",
         "hub_commit_message", "revision", "seed", "no_such_flag", "hub_tokn")  # fmt: skip


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_found_and_taken_out(text: str) -> None:
    assert has_secret(text) and without_secrets(text) == SECRETS[text]


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_is_left_alone(text: str) -> None:
    assert not has_secret(text)


def test_a_long_text_is_searched_in_no_time() -> None:
    assert not has_secret("a" * 10**6 + "?" * 10**5 + "https://" * 10**4)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("secret", ["https://me:hunter2@host.org/x", TOKEN])
@pytest.mark.parametrize("joined", [True, False])
def test_a_secret_behind_any_flag_is_refused_and_not_shown(flag: str, secret: str, joined: bool, capsys) -> None:
    words = [f"--{flag}={secret}"] if joined else [f"--{flag}", secret]
    with pytest.raises(SystemExit) as ended:
        parse_args(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "hunter2" not in said and TOKEN not in said
    assert said.splitlines()[-1].endswith(
        f"error: --{flag} holds what looks like a password or a token, which a run records; leave it out, and log in "
        "with `hf auth login` or set HF_TOKEN."
    )


def test_a_token_in_its_own_place_is_taken_but_not_under_accelerate() -> None:
    for words in (["--hub_token", TOKEN, "--seed", "1"], ["--hub_token=secret"]):
        assert problem(words) is None
        said = str(problem(words, under_accelerate=True))
        assert "would be printed by accelerate launch when the run fails; leave it out, and log in with `hf" in said
    assert problem(["--hub_token", TOKEN, TOKEN]) is not None


def test_accelerate_is_known_by_all_its_names() -> None:
    for start in (
        ["/x/python", "/x/bin/accelerate", "launch"],
        ["accelerate-launch"],
        ["python", "-m", "accelerate.commands.launch"],
    ):
        assert launch_words([*start, "--cpu", "x.py"]) == ["--cpu", "x.py"]
    assert launch_words(["python", "x.py", "launch"]) is None


def test_accelerate_launch_prints_no_token() -> None:
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "train_rdm_lora.py",
        "--hub_token",
        "secret123",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "--hub_token would be printed by accelerate launch when the run fails" in done.stderr
    assert "secret123" not in done.stdout + done.stderr


def test_what_an_older_release_recorded_is_taken_out_of_the_record() -> None:
    args = RunConfig.of().as_arguments() | {"hub_token": TOKEN, "dataset_name": "https://me:hunter2@host.org/x",
                                                  "reward": [f"a={TOKEN}"]}  # fmt: skip
    told = json.dumps(
        training_record({**args, "command": command_line("x.py", [f"--seed={TOKEN}", "http://a:hunter2@b"])}, 2)
    )
    assert "hunter2" not in told and TOKEN not in told


@pytest.mark.parametrize("name", ["rdm_config.json", "README.md", "metrics.json", "evaluation.json"])
def test_a_file_with_a_password_in_an_address_is_not_pushed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"dataset_name": "https://me:hunter2@host.org/x"}')
    with pytest.raises(ValueError, match="holds an address with what looks like a password; take it out") as caught:
        check_secrets([tmp_path / name], None)
    assert "hunter2" not in str(caught.value)
