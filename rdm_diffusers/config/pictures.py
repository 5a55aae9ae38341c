"""Which runs read pictures of what the student is to learn, and not prompts alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run_config import RunConfig

OF_PICTURES: tuple[str, ...] = ()  # the algorithms whose updates read pictures


def reads_pictures(config: RunConfig) -> bool:
    """Whether the updates of student or fake score read pictures."""
    return config.method.algorithm in OF_PICTURES


def needs_pictures(config: RunConfig) -> bool:
    """Whether the run draws the teacher's pictures or encodes the user's: for its target, for its updates, or both."""
    return config.target.teacher_target == "samples" or reads_pictures(config)
