"""The Space of a student: its files, the order of the pushes, and its app, which runs as it is uploaded."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import pytest
from hub_repositories import Repository
from hub_server import HubServer, visitor_environment
from huggingface_hub import SpaceCard
from parts import PROMPTS
from parts_processes import free_port
from push_visit import AGAIN, TOKEN

from rdm_diffusers import __version__
from rdm_diffusers.hub.space import space_files
from rdm_diffusers.pipelines import StudentConfig

SPACE = "spaces/me/student"
# Pushes in one process, which imports everything once: a line of words each.
PUSHES = """
import json, sys
from rdm_diffusers.commands.push import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except (ValueError, OSError) as error:
        print(f"error: {error}")
"""


@dataclass
class Visit:
    """What several pushes left on the Hub, and what they said."""

    said: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    repositories: dict[str, Repository] = field(default_factory=dict)


def push(hub: HubServer, home: Path, *pushes: tuple[str, ...]) -> list[str]:
    """What `rdm-push` says in each of them."""
    environment = visitor_environment(home, HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    words = [sys.executable, "-c", PUSHES, json.dumps(pushes)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def hub(tiny_student: Path) -> Iterator[HubServer]:
    with HubServer({}, {}, {TOKEN: "me"}) as server:
        yield server


@pytest.fixture(scope="module")
def visit(hub: HubServer, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Visit:
    """A student with its Space, twice; a private one whose Space the Hub refuses; a name that no Space can have."""
    home, student = tmp_path_factory.mktemp("home"), str(tiny_student)
    hub.fail(r"POST /api/spaces/me/page/commit/", 500, 99)
    said = push(
        hub, home, (student, "student", "--space"), (student, "me/student", "--space", "student"),
        (student, "me/other", "--private", "--revision", "turbo", "--space", "me/page"),
        (student, "me/new", "--space", "a bad name"),
    )  # fmt: skip
    return Visit(said, list(hub.log), hub.repositories)


def files_of(visit: Visit, name: str = SPACE) -> dict[str, str]:
    commit = visit.repositories[name].at("main")
    assert commit is not None
    return {path: body.decode() for path, body in commit.files.items()}


def test_a_space_of_the_students_name_is_pushed_after_it(visit: Visit, hub: HubServer) -> None:
    assert visit.said[:2] == [
        f"The student's Space is at {hub.address}/spaces/me/student",
        f"The student is at {hub.address}/me/student/commit/{visit.repositories['me/student'].branches['main']}",
    ]
    first = [visit.log.index(f"POST /api/{kind}/me/student/commit/main") for kind in ("models", "spaces")]
    assert first == sorted(first)
    assert visit.log.index("POST /api/repos/create") < first[0]
    assert not visit.repositories[SPACE].private


def test_a_second_push_of_a_space_makes_no_commit(visit: Visit) -> None:
    assert visit.said[2] == visit.said[0]
    assert len(visit.repositories[SPACE].commits) == 2  # the Hub's own, and ours
    assert len(visit.repositories["me/student"].commits) == 2


def test_a_space_that_the_hub_refuses_leaves_the_student_there_and_the_command_makes_it(
    visit: Visit, hub: HubServer, tmp_path: Path
) -> None:
    said = visit.said[4]
    assert said.startswith("error: The push to the Space me/page was not completed (the Hub answered 500")
    words = shlex.split(said.split(AGAIN)[1])
    assert words[2:] == ["me/other", "--private", "--revision", "turbo", "--space", "me/page"]
    assert "rdm_config.json" in visit.repositories["me/other"].at("turbo").files
    hub.faults.clear()
    again = push(hub, tmp_path, tuple(words[1:]))
    assert again[0] == f"The student's Space is at {hub.address}/spaces/me/page"
    assert again[2] == "To read the private student, its Space needs a token as the secret HF_TOKEN in its settings."
    assert hub.repositories["spaces/me/page"].private
    app = hub.repositories["spaces/me/page"].at("main").files["app.py"].decode()
    assert 'main(["me/other", "--server_name", "0.0.0.0", "--revision", "turbo"])' in app


def test_the_card_of_a_space_says_what_runs_it_and_which_models_it_shows(visit: Visit) -> None:
    card = SpaceCard(files_of(visit)["README.md"])
    assert card.data.to_dict() == {
        "title": "student beside its teacher", "sdk": "gradio", "sdk_version": version("gradio"),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}", "app_file": "app.py",
        "license": "apache-2.0", "models": ["me/student"],
    }  # fmt: skip
    assert "A 2-step student beside its teacher." in card.text


def test_the_card_of_a_space_names_a_teacher_on_the_hub(tiny_student: Path) -> None:
    config = StudentConfig.load(str(tiny_student))
    object.__setattr__(config, "base_model_name_or_path", "stabilityai/sdxl-turbo")
    assert SpaceCard(space_files("me/x", config)["README.md"]).data.models == ["me/x", "stabilityai/sdxl-turbo"]


def test_the_requirements_are_this_package_with_gradio_and_the_versions_that_pictures_depend_on(
    visit: Visit, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, *others = files_of(visit)["requirements.txt"].splitlines()
    assert own == f"rdm-diffusers[demo]=={__version__}"
    assert dict(line.split("==") for line in others).keys() >= {"torch", "diffusers", "transformers", "peft"}
    assert f"torch=={version('torch').split('+')[0]}" in others
    installed = tmp_path / "rdm_diffusers-9.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: rdm-diffusers\nVersion: 9\n")
    origin = {"url": "https://me:secret@host/rdm.git", "vcs_info": {"vcs": "git", "commit_id": "0123abcd"}}
    (installed / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)
    files = space_files("me/student", StudentConfig.load(str(tiny_student)))
    assert files["requirements.txt"].splitlines()[0] == "rdm-diffusers[demo] @ git+https://host/rdm.git@0123abcd"


def test_a_name_that_no_space_can_have_is_refused_before_anything_is_pushed(visit: Visit) -> None:
    assert visit.said[-1].startswith("error: 'a bad name' is no name of a repository; give NAME or USER/NAME")
    assert not any("me/new" in line for line in visit.log)


@contextmanager
def started(app: Path, **environment: str) -> Iterator[str]:
    """What an app prints when it is ready; it must end well on Ctrl-C."""
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); exec(open({str(app)!r}).read())"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        lines = []
        while process.poll() is None and not (lines and lines[-1].startswith("The page is at")):
            lines.append(process.stdout.readline())
        yield "".join(lines)
    finally:
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and errors == "", errors


def test_the_app_of_a_space_shows_the_student_of_the_hub(visit: Visit, hub: HubServer, tmp_path: Path) -> None:
    app, port = tmp_path / "app.py", free_port()
    app.write_text(files_of(visit)["app.py"])
    environment = visitor_environment(tmp_path, HF_ENDPOINT=hub.address, GRADIO_SERVER_PORT=str(port))
    with started(app, **{**environment, "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}) as said:
        assert said.splitlines()[0] == "Loading me/student and its teacher on cpu."
        assert said.splitlines()[1] == f"The page is at http://localhost:{port}/; Ctrl-C ends it."
        with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{port}/config", timeout=30) as answer:
            page = json.load(answer)
    assert page["title"] == "me/student · rdm-demo"
    first = [each["props"].get("value") for each in page["components"] if each["props"].get("elem_id") == "prompt"]
    assert first == [PROMPTS[0]]  # of the card's pictures
