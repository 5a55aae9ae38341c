"""`rdm-demo`: what student and teacher draw, what the page answers, and what a visitor sees in a browser."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from parts import PROMPTS, run_arguments
from parts_browser import open_page
from parts_loras import write_lora
from parts_processes import free_port
from PIL import Image

import train_rdm_lora
from rdm_diffusers import RdmDistillationPipeline
from rdm_diffusers.commands import demo as command
from rdm_diffusers.demo import Comparison, example_prompts, import_gradio, load_comparison, make_page, serving
from rdm_diffusers.demo.inputs import MOST_CHARACTERS, MOST_PROMPTS
from rdm_diffusers.demo.page import Answers, _explained
from rdm_diffusers.pipelines import StudentConfig
from rdm_diffusers.tiny import TINY_FLOW_NAME, TINY_NAME, resolve_teacher
from rdm_diffusers.tiny.captions import CAPTIONS

CPU = torch.device("cpu")
SCREENSHOT = Path(__file__).parents[1] / "docs/images/demo.png"
# A trained student's folder, for the screenshot.
SCREENSHOTS, SHOWN = os.environ.get("RDM_SCREENSHOTS"), os.environ.get("RDM_DEMO_STUDENT")
SOLVERS = {TINY_NAME: DDIMScheduler, TINY_FLOW_NAME: FlowMatchEulerDiscreteScheduler}
NOTHING = {"text_encoder_3": None, "tokenizer_3": None}
STRIP = (
    "a yellow zero on a blue background", "a white two on a cyan background", "a green three on a pink background",
    "a purple five on a grey background", "a black six on a pink background", "a red eight on a blue background",
)  # fmt: skip
USUAL = (0, 2, 3, 4.0)  # seed, the student's steps, the teacher's, its guidance


def load(folder: Path) -> Comparison:
    return load_comparison(str(folder), torch.float32, CPU)


@pytest.fixture(scope="module")
def comparison(tiny_student: Path) -> Comparison:
    return load(tiny_student)


def record(student: Path, **arguments: Any) -> None:
    """Writes arguments of its training into a student's configuration."""
    config = StudentConfig.load(str(student))
    training = config.training | {"arguments": config.arguments | arguments}
    replace(config, training=training).save(student)


def pixels(pictures) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


def drawn_by_stock(teacher: str, steps: int = 3, lora: Path | None = None) -> np.ndarray:
    """What stock diffusers draws with an embedded teacher, or one in a folder, from seed 5 at guidance 4."""
    options, length = (NOTHING, {"max_sequence_length": 1}) if teacher == TINY_FLOW_NAME else ({}, {})
    pipeline = DiffusionPipeline.from_pretrained(resolve_teacher(teacher), dtype=torch.float32, **options)
    pipeline.scheduler = SOLVERS.get(teacher, DDIMScheduler).from_config(pipeline.scheduler.config)
    if lora:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(5) for _ in PROMPTS[:2]]
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 4.0, **length}
    return pixels(pipeline(list(PROMPTS[:2]), generator=generators, **call).images)


def drawn_by_teacher(comparison: Comparison) -> np.ndarray:
    return pixels(comparison.draw_teacher(PROMPTS[:2], 5, 3, 4.0).pictures)


def drawn_by_student(comparison: Comparison) -> np.ndarray:
    return pixels(comparison.draw_student(PROMPTS[:2], 5, 2).pictures)


def differ(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference, of 255; batches of 2 and of 1 may round differently."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# --- student and teacher ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", SOLVERS)
def test_under_a_lora_student_the_teacher_is_the_same_network_and_draws_what_stock_diffusers_draws(
    teacher: str, prompts_file: Path, tmp_path: Path
) -> None:
    options = {"steps_per_rollout": 2, "learning_rate": 5e-2, "sample_guidance_scale": 3.0}
    train_rdm_lora.main(run_arguments(teacher, prompts_file, tmp_path, **options))
    comparison = load(tmp_path)
    assert (comparison.student_steps, comparison.teacher_steps, comparison.guidance_scale) == (2, 50, 3.0)
    own, other = comparison._pipeline, comparison._teacher
    assert comparison.family.denoiser(own) is comparison.family.denoiser(other)
    before = drawn_by_student(comparison)
    assert differ(drawn_by_teacher(comparison), drawn_by_stock(teacher)) <= 1
    assert np.array_equal(drawn_by_student(comparison), before)
    student = RdmDistillationPipeline.from_pretrained(tmp_path)
    student.set_progress_bar_config(disable=True)
    alone = student(PROMPTS[0], generator=torch.Generator().manual_seed(5)).images
    assert differ(pixels(alone), before[:1]) <= 1
    assert differ(before, drawn_by_stock(teacher, 2)) > 10


def test_the_students_lora_is_on_again_after_an_error_of_the_teacher(tiny_student: Path) -> None:
    comparison = load(tiny_student)
    before = drawn_by_student(comparison)
    with pytest.raises(ValueError, match="larger than"):
        comparison.draw_teacher(PROMPTS[:1], 0, 10_000, 4.0)
    assert np.array_equal(drawn_by_student(comparison), before)


def test_beside_a_full_student_the_teacher_is_another_network_with_the_same_encoders(
    tiny_student: Path, tmp_path: Path
) -> None:
    RdmDistillationPipeline.from_pretrained(tiny_student).save_pretrained(tmp_path)
    comparison = load(tmp_path)
    own, other = comparison._pipeline, comparison._teacher
    assert own.unet is not other.unet
    assert own.vae is other.vae and own.text_encoder is other.text_encoder
    assert differ(drawn_by_teacher(comparison), drawn_by_stock(TINY_NAME)) <= 1
    assert differ(drawn_by_student(comparison), drawn_by_student(load(tiny_student))) <= 1


def test_loras_of_the_teacher_that_are_in_its_student_are_in_the_teacher_beside_it(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    lora, student = write_lora(tmp_path / "style"), tmp_path / "student"
    train_rdm_lora.main(run_arguments(teacher_folder, prompts_file, student, teacher_lora=lora))
    with pytest.raises(ValueError, match="does not say where its teacher is; show the student alone with --no_teacher"):
        load(student)  # it names no folder of the machine that it was made on
    record(student, pretrained_model_name_or_path=str(teacher_folder), teacher_lora=[str(lora)])
    drawn = drawn_by_teacher(load(student))
    assert differ(drawn, drawn_by_stock(str(teacher_folder), lora=lora)) <= 1
    assert differ(drawn, drawn_by_stock(str(teacher_folder))) > 1


def test_a_full_student_that_does_not_say_where_its_teacher_is_can_be_shown_alone(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    train_rdm_lora.main(run_arguments(teacher_folder, prompts_file, tmp_path / "lora", max_train_steps=1))
    RdmDistillationPipeline.from_pretrained(tmp_path / "lora").save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="does not say where its teacher is; show the student alone with --no_teacher"):
        load(tmp_path / "full")
    alone = load_comparison(str(tmp_path / "full"), torch.float32, CPU, with_teacher=False)
    assert not alone.has_teacher
    ((waiting,), (shown,)) = Answers(alone).draw("a picture", *USUAL)
    assert "drawing" in waiting and "2 network calls" in shown


def test_calls_are_counted_with_guidance_and_seconds_are_measured(comparison: Comparison) -> None:
    drawings = [
        comparison.draw_student(PROMPTS[:2], 0, 2),
        comparison.draw_student(PROMPTS[:2], 0, 7),
        comparison.draw_teacher(PROMPTS[:2], 0, 3, 4.0),
        comparison.draw_teacher(PROMPTS[:2], 0, 3, 1.0),
    ]
    assert [drawing.calls for drawing in drawings] == [2, 7, 6, 3]
    assert all(0 < drawing.seconds < 60 and len(drawing.pictures) == 2 for drawing in drawings)


def test_the_first_prompts_are_those_of_the_card_or_else_the_captions(tiny_student: Path, tmp_path: Path) -> None:
    config = StudentConfig.load(str(tiny_student))
    assert example_prompts(str(tiny_student), config) == [PROMPTS[0], PROMPTS[2]]
    assert set(example_prompts(str(tmp_path), config)) < set(CAPTIONS)


# --- what the page answers ----------------------------------------------------------------------------------------

SENTENCES: list[tuple[str, Callable[[Answers], Iterator[Any]], str]] = [
    ("blank", lambda it: it.draw("  ", *USUAL), "The prompt is empty; write what is to be drawn."),
    ("no prompt", lambda it: it.draw(None, *USUAL), "The prompt is empty; write what is to be drawn."),
    ("long", lambda it: it.draw("a" * (MOST_CHARACTERS + 1), *USUAL), "The prompt has 1001 characters; it must have"),
    ("no lines", lambda it: it.draw_strip("\n \n", *USUAL), "The prompt is empty; write what is to be drawn."),
    ("lines", lambda it: it.draw_strip("a\n" * (MOST_PROMPTS + 1), *USUAL), "There are 9 prompts; at most 8 are drawn"),
    ("seed", lambda it: it.draw("a", -1, *USUAL[1:]), "The seed is -1; it must be at least 0 and at most 4294967295."),
    ("no seed", lambda it: it.draw("a", None, *USUAL[1:]), "The seed is no number; it must be at least 0"),
    ("half a seed", lambda it: it.draw("a", 0.5, *USUAL[1:]), "The seed is 0.5, which is not whole; it must be"),
    ("nan", lambda it: it.draw("a", float("nan"), *USUAL[1:]), "The seed is no number; it must be"),
    ("text", lambda it: it.draw("a", "../x", *USUAL[1:]), "The seed is no number; it must be"),
    ("steps", lambda it: it.draw("a", 0, 9, 3, 4.0), "The student's number of steps is 9; it must be at least 1"),
    ("teacher", lambda it: it.draw("a", 0, 2, 101, 4.0), "The teacher's number of steps is 101; it must be"),
    ("guidance", lambda it: it.draw("a", 0, 2, 3, -1), "The teacher's guidance is -1.0; it must lie in [0, 20]."),
]


@pytest.mark.parametrize(("answer", "sentence"), [row[1:] for row in SENTENCES], ids=[row[0] for row in SENTENCES])
def test_what_is_out_of_bounds_is_answered_with_one_sentence(
    comparison: Comparison, answer: Callable[[Answers], Iterator[Any]], sentence: str
) -> None:
    with pytest.raises(ValueError) as caught:
        next(answer(Answers(comparison)))
    said = str(caught.value)
    assert said.startswith(sentence) and said.endswith(".") and "\n" not in said


def test_text_of_visitors_and_students_never_becomes_markup(comparison: Comparison) -> None:
    hostile = '"><script>alert(1)</script>'
    *_, cards = Answers(comparison).draw(hostile, *USUAL)
    *_, (strip,) = Answers(comparison).draw_strip(f"{hostile}\n{hostile}", *USUAL)
    page = make_page(comparison, hostile, hostile, [hostile])
    titles = [block.value for block in page.blocks.values() if type(block).__name__ == "HTML" and block.value]
    assert len(cards) == 2 and titles
    for text in (*cards, strip, *titles):
        assert "<script" not in text


def test_an_error_while_pictures_are_drawn_is_a_sentence_and_takes_back_what_was_begun() -> None:
    def answer(prompt: str) -> Iterator[tuple[str]]:
        yield (f"drawing {prompt}",)
        raise MemoryError("<b>")

    gradio = import_gradio()
    shown = _explained(gradio, answer, lambda: "nothing")("a")
    assert [next(shown), next(shown)] == ["drawing a", "nothing"]
    with pytest.raises(gradio.Error, match=r"There is not enough memory \(&lt;b&gt;\); draw fewer prompts at once"):
        next(shown)


def test_without_gradio_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ImportError, match=r"^The page needs Gradio: pip install 'rdm-diffusers\[demo\]'$"):
        import_gradio()


def test_a_port_that_is_taken_is_one_sentence(comparison: Comparison) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(OSError, match=rf"^Port {port} of 127.0.0.1 is taken; choose another with --server_port\.$"),
            serving(make_page(comparison, "student", "tiny", PROMPTS[:2]), port=port),
        ):
            pass


@pytest.mark.parametrize("device", ["abacus", "cuda:77", "meta"])
def test_a_device_that_is_not_there_is_one_sentence(device: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        command.main(["student", "--device", device])
    said = capsys.readouterr().err
    wanted = "it must be cpu, or an accelerator of this machine such as cuda or cuda:1."
    assert said == f"rdm-demo: error: --device is {device}; {wanted}\n"


# --- in a browser -------------------------------------------------------------------------------------------------


@contextmanager
def visited(folder: Path) -> Iterator[Any]:
    """The page of a student in a browser; afterwards no request may have gone to another host."""
    comparison = load(folder)
    comparison.warm_up()
    prompts = example_prompts(str(folder), comparison.student)
    with open_page() as page, serving(make_page(comparison, "tiny-student", "tiny", prompts), port=free_port()) as at:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(at[0])
        page.wait_for_selector("#draw")
        yield page
        hosts = {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))}
        assert hosts == {"127.0.0.1"}


def pictures_in(page: Any, place: str, count: int) -> list[tuple[int, str]]:
    """Waits for the pictures; the width of each as it was drawn, and how it is enlarged."""
    page.wait_for_function("([place, count]) => document.querySelectorAll(`${place} img`).length == count",
                           arg=[place, count], timeout=120_000)  # fmt: skip
    return page.eval_on_selector_all(
        f"{place} img", "all => all.map(img => [img.naturalWidth, getComputedStyle(img).imageRendering])"
    )


def test_a_visitor_sees_the_pictures_of_both_with_their_calls_and_seconds(tiny_student: Path) -> None:
    with visited(tiny_student) as page:
        page.fill("#prompt textarea", PROMPTS[1])
        page.click("#draw")
        assert pictures_in(page, ".rdm-card figure", 2) == [[32, "pixelated"]] * 2
        captions = page.locator(".rdm-card figcaption").all_inner_texts()
        assert [caption.split(" · ")[0] for caption in captions] == ["2 network calls", "100 network calls"]
        assert all(float(caption.split(" · ")[1].removesuffix(" s")) > 0 for caption in captions)
        assert page.locator(".rdm-card figure img").first.get_attribute("alt") == PROMPTS[1]


def test_a_visitor_draws_a_strip_from_a_random_seed(tiny_student: Path) -> None:
    with visited(tiny_student) as page:
        page.click("#random")
        page.wait_for_function("document.querySelector('#seed input').value != '0'")
        page.fill("#prompts textarea", "\n".join(PROMPTS[:3]))
        page.click("#draw-strip")
        assert pictures_in(page, ".rdm-strip", 6) == [[32, "pixelated"]] * 6
        assert page.locator(".rdm-strip p").all_inner_texts() == list(PROMPTS[:3])


def test_a_visitor_reads_what_is_wrong_and_keeps_the_pictures(tiny_student: Path) -> None:
    with visited(tiny_student) as page:
        page.click("#draw")
        pictures_in(page, ".rdm-card figure", 2)
        page.fill("#seed input", "-1")
        page.click("#draw")
        page.wait_for_selector("text=The seed is -1; it must be at least 0 and at most 4294967295.")
        assert len(pictures_in(page, ".rdm-card figure", 2)) == 2


@pytest.mark.skipif(not (SCREENSHOTS and SHOWN), reason="needs RDM_SCREENSHOTS=1 and RDM_DEMO_STUDENT=FOLDER")
def test_the_screenshot_shows_a_trained_student() -> None:
    with visited(Path(str(SHOWN))) as page:
        page.fill("#prompt textarea", "a red seven on a blue background")
        page.click("#draw")
        pictures_in(page, ".rdm-card figure", 2)
        page.fill("#prompts textarea", "\n".join(STRIP))
        page.click("#draw-strip")
        pictures_in(page, ".rdm-strip", 12)
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.wait_for_timeout(500)
        page.screenshot(path=SCREENSHOT, full_page=True)
    with Image.open(SCREENSHOT) as picture:
        assert picture.width == 1100
