"""The prompts that a student's page begins with."""

from __future__ import annotations

from pathlib import Path

from ..families import fetch
from ..hub.card import PROMPT
from ..hub.card_text import METRICS_FILE, read_measurements
from ..pipelines import StudentConfig
from ..tiny import is_tiny
from ..tiny.domains import domain_of

MOST = 6


def example_prompts(name: str, student: StudentConfig, revision: str | None = None) -> list[str]:
    """The prompts of the pictures in a student's card; without those, the tiny teachers' captions, or one prompt.

    Args:
        name: the student's folder or Hub id.
        student: its configuration.
        revision: of a student on the Hub.

    Raises:
        ValueError: if its `metrics.json` is damaged.
    """
    recorded = [prompt for prompt in _recorded_prompts(name, revision) if prompt.strip()]
    teacher = student.teacher or ""
    usual = domain_of(teacher).captions[7::41] if is_tiny(teacher) else [PROMPT]
    return list(dict.fromkeys(recorded or usual))[:MOST]


def _recorded_prompts(name: str, revision: str | None) -> list[str]:
    try:
        folder = Path(name)
        path = folder / METRICS_FILE if folder.is_dir() else fetch("student", name, METRICS_FILE, revision=revision)
    except ValueError:  # a repository need not have that file
        return []
    return (read_measurements(path) or {}).get("prompts") or []
