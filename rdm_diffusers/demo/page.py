"""The page: a prompt, the student's picture beside its teacher's, and a strip of several prompts. Made with Gradio."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

from ..program import explain
from . import html
from .comparison import Comparison
from .inputs import MOST_GUIDANCE, MOST_PROMPTS, MOST_TEACHER_STEPS, Settings, checked_prompt, checked_prompts

EXTRA = "pip install 'rdm-diffusers[demo]'"
MEMORY_ADVICE = "draw fewer prompts at once, or start rdm-demo with --dtype bfloat16"
QUEUE = 32  # visitors that wait; others are asked to come later
CACHED = 3600  # seconds that Gradio's own files stay on the disk
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "networks", "concurrency_limit": 1, "api_visibility": "private"}
RANDOM_SEED = "() => Math.floor(Math.random() * 2 ** 31)"
Cards = tuple[str, ...]  # the student's, and the teacher's if it is there


def import_gradio() -> Any:
    """Gradio, which then tells nobody of its use.

    Raises:
        ImportError: naming the extra to install.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"The page needs Gradio: {EXTRA}") from error
    return gradio


class Answers:
    """What the page answers to a press of its buttons.

    Args:
        comparison: draws the pictures.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        steps, guidance_scale = comparison.student_steps, comparison.guidance_scale
        self.usual = Settings(0, steps, comparison.teacher_steps, guidance_scale)

    def draw(self, prompt: str | None, *values: Any) -> Iterator[Cards]:
        """First the student's picture, then the teacher's."""
        prompt, settings = checked_prompt(prompt), self._checked(values)
        yield self._empty(settings, "drawing …", "next …")
        drawing = self.comparison.draw_student([prompt], settings.seed, settings.student_steps)
        own = html.card("Student", _student_note(settings), prompt, drawing)
        yield (own, *self._empty(settings, "", "drawing …")[1:])
        if self.comparison.has_teacher:
            drawing = self.comparison.draw_teacher([prompt], *settings.teachers)
            yield own, html.card("Teacher", _teacher_note(settings), prompt, drawing)

    def draw_strip(self, text: str | None, *values: Any) -> Iterator[tuple[str]]:
        """The same for several prompts, one a line."""
        prompts, settings = checked_prompts(text), self._checked(values)
        rows = [("Student", self.comparison.draw_student(prompts, settings.seed, settings.student_steps))]
        yield (html.strip(prompts, rows),)
        if self.comparison.has_teacher:
            rows.append(("Teacher", self.comparison.draw_teacher(prompts, *settings.teachers)))
            yield (html.strip(prompts, rows),)

    def at_first(self) -> Cards:
        """The cards before the first picture."""
        return self._empty(self.usual, "Press Draw", "")

    def _checked(self, values: Sequence[Any]) -> Settings:
        return Settings.checked(self.comparison.most_student_steps, *values)

    def _empty(self, settings: Settings, student_says: str, teacher_says: str) -> Cards:
        own = html.empty_card("Student", _student_note(settings), student_says)
        if not self.comparison.has_teacher:
            return (own,)
        return own, html.empty_card("Teacher", _teacher_note(settings), teacher_says)


def _student_note(settings: Settings) -> str:
    return _steps(settings.student_steps)


def _teacher_note(settings: Settings) -> str:
    return f"{_steps(settings.teacher_steps)}, guidance {settings.guidance_scale:g}"


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def _explained(gradio: Any, answer: Callable[..., Iterator[Any]], at_first: Callable[[], Any]) -> Callable:
    """An answer whose foreseen errors are shown in the page as one sentence; what was being drawn is taken back."""

    def explained(*inputs: Any) -> Iterator[Any]:
        started = False
        try:
            for shown in answer(*inputs):
                started = True
                yield shown if len(shown) > 1 else shown[0]
        except Exception as error:
            sentence = explain(error, MEMORY_ADVICE)
            if started:
                yield at_first()
            if sentence is None:
                raise
            raise gradio.Error(escape(sentence), print_exception=False) from error

    return explained


def make_page(comparison: Comparison, student: str, teacher: str | None, prompts: Sequence[str]) -> Any:
    """The page, as Gradio's `Blocks`.

    Args:
        comparison: draws the pictures.
        student, teacher: their names for visitors.
        prompts: to begin with, one at least.

    Raises:
        ImportError: as `import_gradio`.
    """
    gradio = import_gradio()
    answers = Answers(comparison)
    with gradio.Blocks(title=f"{student} · rdm-demo", analytics_enabled=False, delete_cache=(CACHED, CACHED)) as page:
        gradio.HTML(html.title(student, comparison.student_steps, teacher if comparison.has_teacher else None))
        with gradio.Row(equal_height=True):
            prompt = gradio.Textbox(prompts[0], container=False, placeholder="a prompt", scale=6, elem_id="prompt")
            draw = gradio.Button("Draw", variant="primary", scale=1, min_width=110, elem_id="draw")
        with gradio.Row(equal_height=True):
            cards = [gradio.HTML(card) for card in answers.at_first()]
        settings = _settings(gradio, answers)
        gradio.HTML(html.heading("Several prompts from the same seed"))
        with gradio.Row(equal_height=True):
            lines = gradio.Textbox("\n".join(prompts), container=False, lines=3, max_lines=MOST_PROMPTS, scale=6,
                                   placeholder="one prompt a line", elem_id="prompts")  # fmt: skip
            draw_strip = gradio.Button("Draw all", scale=1, min_width=110, elem_id="draw-strip")
        strip = gradio.HTML()
        one = _explained(gradio, answers.draw, answers.at_first)
        gradio.on([draw.click, prompt.submit], one, [prompt, *settings], cards, show_progress="hidden", **ONE_AT_A_TIME)
        several = _explained(gradio, answers.draw_strip, str)
        draw_strip.click(several, [lines, *settings], strip, **ONE_AT_A_TIME)
    return page.queue(max_size=QUEUE, api_open=False)


def _settings(gradio: Any, answers: Answers) -> list[Any]:
    """The inputs for the fields of `Settings`; the teacher's are hidden without it."""
    usual, shown = answers.usual, answers.comparison.has_teacher
    most = answers.comparison.most_student_steps
    look: dict[str, Any] = {"step": 1, "min_width": 180, "buttons": []}
    teachers = {**look, "visible": shown}
    with gradio.Row(equal_height=True):
        student_steps = gradio.Slider(1, most, usual.student_steps, label="Student steps", **look)
        steps = gradio.Slider(1, MOST_TEACHER_STEPS, usual.teacher_steps, label="Teacher steps", **teachers)
        guidance = gradio.Slider(0, MOST_GUIDANCE, usual.guidance_scale, label="Guidance", **teachers | {"step": 0.5})
        with gradio.Row(equal_height=True):
            seed = gradio.Number(usual.seed, label="Seed", elem_id="seed", min_width=80)
            random = gradio.Button("Random", elem_id="random", min_width=90, scale=0)
    random.click(None, None, seed, js=RANDOM_SEED)
    return [seed, student_steps, steps, guidance]
