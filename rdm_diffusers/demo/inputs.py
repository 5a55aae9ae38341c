"""What visitors may ask for; whatever lies outside of it is answered with one sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..bounds import Interval, real, whole

MOST_CHARACTERS = 1000  # of a prompt; text encoders read fewer
MOST_PROMPTS = 8
MOST_TEACHER_STEPS = 100
MOST_GUIDANCE = 20.0
SEED = whole(f"[0, {2**32 - 1}]")  # browsers know no whole numbers above 2**53 exactly


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn.

    Args:
        seed: of the first noise, and of all others.
        student_steps, teacher_steps: numbers of steps.
        guidance_scale: the teacher's w in u + w (c - u).
    """

    seed: int
    student_steps: int
    teacher_steps: int
    guidance_scale: float

    @classmethod
    def checked(cls, most_student_steps: int, *values: Any) -> Settings:
        """The settings that a browser sent, in the order of the fields.

        Raises:
            ValueError: naming the first that is out of its bounds.
        """
        bounds = {
            "The seed": SEED,
            "The student's number of steps": whole(f"[1, {most_student_steps}]"),
            "The teacher's number of steps": whole(f"[1, {MOST_TEACHER_STEPS}]"),
            "The teacher's guidance": real(f"[0, {MOST_GUIDANCE:g}]"),
        }
        return cls(*(_number(*entry, value) for entry, value in zip(bounds.items(), values, strict=True)))

    @property
    def teachers(self) -> tuple[int, int, float]:
        """The seed and the teacher's own."""
        return self.seed, self.teacher_steps, self.guidance_scale


def checked_prompt(text: str | None) -> str:
    """A prompt without blanks around it.

    Raises:
        ValueError: if it is empty or too long.
    """
    prompt = (text or "").strip()
    if not prompt:
        raise ValueError("The prompt is empty; write what is to be drawn.")
    if len(prompt) > MOST_CHARACTERS:
        raise ValueError(f"The prompt has {len(prompt)} characters; it must have at most {MOST_CHARACTERS}.")
    return prompt


def checked_prompts(text: str | None) -> list[str]:
    """The prompts of several lines; empty lines do not count.

    Raises:
        ValueError: if there is none, if there are too many, or if one of them is too long.
    """
    lines = [line for line in (text or "").splitlines() if line.strip()]
    if len(lines) > MOST_PROMPTS:
        raise ValueError(f"There are {len(lines)} prompts; at most {MOST_PROMPTS} are drawn at once.")
    return [checked_prompt(line) for line in lines or [""]]


def _number(name: str, bound: Interval, value: Any) -> Any:
    """A number within its bound, whole if the bound is; `name` starts the sentence that refuses it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is no number; it must {bound.wants}.")
    if bound.whole and value != int(value):
        raise ValueError(f"{name} is {value:g}, which is not whole; it must {bound.wants}.")
    number = int(value) if bound.whole else float(value)
    problem = bound.problem(number)
    if problem:
        raise ValueError(f"{name} {problem}.")
    return number
