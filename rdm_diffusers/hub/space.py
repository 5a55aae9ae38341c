"""The Space of a student: a repository of the Hub that runs `rdm-demo` of it for everybody with a browser."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, SpaceCardData

from .. import __version__
from ..evaluation.subjects import DRAWING_PACKAGES, installed_versions
from ..families import CARD
from ..pipelines import StudentConfig
from ..untrusted import without_secrets
from .card_text import plain
from .push import check_repo_id, full_name, opened, unfinished
from .student_files import is_hub_id

PACKAGE = "rdm-diffusers"
APP = '''"""Shows {student} beside its teacher."""

from rdm_diffusers.commands.demo import main

main({arguments})
'''
TEXT = """
# {name}

A {steps}-step student beside its teacher. The student is [{student}](https://huggingface.co/{student}).
"""


def push_space(
    folder: Path, repo_id: str, space: str, *, token: str | None = None, private: bool | None = None,
    revision: str | None = None, retry: str,
) -> str:  # fmt: skip
    """Makes the Space of a pushed student, or brings it up to date; its other files stay as they are.

    Args:
        folder: the student's, for its configuration.
        repo_id: where the student was pushed to.
        space: the name of the Space, `NAME` or `USER/NAME`; it may be the student's.
        token, private: as in `push_student`, of the Space.
        revision: of the student.
        retry: the command that an error names.

    Returns:
        The Space's address.

    Raises:
        ValueError, ImportError: as `check_space`.
        PushError: if the Hub refused it.
    """
    check_space(space)
    config = StudentConfig.load(str(folder))
    what = unfinished(f"the Space {space}", retry)
    with opened(space, *what, token, private, repo_type="space") as (api, name):
        student = full_name(api, repo_id)
        files = space_files(student, config, revision)
        operations = [CommitOperationAdd(path, text.encode()) for path, text in files.items()]
        message = f"Demo of {student}"
        api.create_commit(name, operations, commit_message=message, repo_type="space")
        return f"{api.endpoint}/spaces/{name}"


def check_space(space: str) -> None:
    """Refuses a name that no Space can have, and an installation that cannot say which Gradio a Space needs.

    Raises:
        ValueError, ImportError: one sentence on what to do.
    """
    check_repo_id(space)
    try:
        version("gradio")
    except PackageNotFoundError as error:
        raise ImportError(f"A Space needs Gradio here, too, for its version: pip install '{PACKAGE}[demo]'") from error


def space_files(student: str, config: StudentConfig, revision: str | None = None) -> dict[str, str]:
    """The files of a Space by their paths.

    Args:
        student: its Hub id.
        config: its configuration.
        revision: of it, if not `main`.
    """
    arguments = [student, "--server_name", "0.0.0.0", *(["--revision", revision] if revision else [])]
    name = student.split("/")[-1]
    text = TEXT.format(name=name, steps=config.num_inference_steps, student=student)
    return {
        "app.py": APP.format(student=student, arguments=json.dumps(arguments)),
        "requirements.txt": "\n".join(_requirements()) + "\n",
        CARD: f"---\n{_card_data(student, config).to_yaml()}\n---\n{text}",
    }


def _card_data(student: str, config: StudentConfig) -> SpaceCardData:
    teacher, license_name = config.teacher or "", config.license.get("license")
    return SpaceCardData(
        title=f"{student.split('/')[-1]} beside its teacher",
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        license=license_name and plain(license_name),
        models=[student, *([teacher] if "/" in teacher and is_hub_id(teacher) else [])],
    )


def _requirements() -> list[str]:
    """This package, and the versions of those that pictures depend on; Gradio's is in the card."""
    versions = installed_versions(DRAWING_PACKAGES).items()
    return [_own_requirement(), *(f"{name}=={number.split('+')[0]}" for name, number in versions)]


def _own_requirement() -> str:
    """This package: the commit that pip installed it from, or else its release."""
    try:
        origin: dict[str, Any] = json.loads(distribution(PACKAGE).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        origin = {}
    source = origin.get("vcs_info")
    if source:
        address = f"{source['vcs']}+{without_secrets(origin['url'])}@{source['commit_id']}"
        return f"{PACKAGE}[demo] @ {address}"
    return f"{PACKAGE}[demo]=={__version__}"
