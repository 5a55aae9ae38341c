"""`report.html` in a real browser: it needs no network, moves, has real curves, and runs nothing that a prompt says."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from parts import run_arguments
from parts_browser import open_page
from PIL import Image

import train_rdm_lora
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.report import Report, Status, curves, images
from rdm_diffusers.report.rows import append_row
from rdm_diffusers.training.quality import train_and_report
from rdm_diffusers.training.trainer import Callback, Trainer

HOSTILE = "<script>document.title = 'owned'</script>\"><img src=x onerror=\"document.title='owned'\"> {{ 7 * 7 }}"
SCREENSHOT = Path(__file__).parents[1] / "docs" / "images" / "report.png"
SCREENSHOTS, RUN = os.environ.get("RDM_SCREENSHOTS"), os.environ.get("RDM_REPORT_RUN")  # the folder of a run
METRICS = ["--validation_metrics", "fd_to_teacher", "tiny_bold", "--reference_teacher", "tiny",
           "--num_validation_metric_images", "4", "--metric_for_best_model", "fd_to_teacher"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(teacher_folder: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of four updates, with a prompt that attacks the page."""
    folder = tmp_path_factory.mktemp("report") / "student"
    prompts = ["--validation_prompt", HOSTILE, "--validation_prompt", "a red seven"]
    argv = run_arguments(
        teacher_folder, prompts_file, folder, max_train_steps=4, validation_steps=1, logging_steps=1,
        steps_per_rollout=2,
    )  # fmt: skip
    train_rdm_lora.main([*argv, *METRICS, *prompts])
    return folder


def test_the_page_loads_without_network_and_its_slider_changes_the_picture(folder: Path) -> None:
    problems, requests = [], []
    with open_page(viewport={"width": 1100, "height": 900}) as page:
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((folder / "report.html").as_uri())
        page.wait_for_selector(".chart svg path.line")
        assert page.inner_text(".state") == "finished"
        slider, picture = page.locator("#time"), page.locator("#picture")
        assert slider.get_attribute("max") == "3"
        assert page.inner_text("#when") == slider.get_attribute("aria-valuetext") == "update 4"
        last = picture.get_attribute("src")
        assert page.inner_text("#when") == "update 4"
        slider.focus()
        page.keyboard.press("ArrowLeft")
        assert picture.get_attribute("src") != last
        assert page.inner_text("#when") == "update 3"
        assert picture.get_attribute("alt").startswith("The student's images after 3 updates, from left to right: <scr")
        page.keyboard.press("ArrowRight")
        assert picture.get_attribute("src") == last
        assert picture.evaluate("image => image.complete && image.naturalWidth") > 0
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def test_the_curves_have_the_runs_numbers_and_show_them_to_mouse_and_keyboard(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "validation" / "metrics.jsonl").read_text().splitlines()]
    with open_page(viewport={"width": 1100, "height": 900}) as page:
        page.goto((folder / "report.html").as_uri())
        titles = page.locator(".chart h3").all_inner_texts()
        assert {"fd_to_teacher", "tiny_bold", "Distance to the teacher", "Learning rates"} <= set(titles)
        chart = page.locator(".chart").first
        assert chart.locator("circle:not(.best)").count() == len(rows) == 4
        chart.locator("svg").focus()
        page.keyboard.press("Home")
        assert page.locator("#tip").inner_text().splitlines() == [
            "update 1", f"fd_to_teacher: {rows[0]['fd_to_teacher']:.4g}"
        ]  # fmt: skip
        page.keyboard.press("Escape")
        assert page.locator("#tip").is_hidden()
        box = chart.locator("svg").bounding_box()
        page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 40)
        assert page.locator("#tip b").inner_text() == "update 4"
        texts = chart.locator("text").all_text_contents()
        assert {"1", "4"} <= set(texts) and len(texts) >= 6


def test_a_prompt_with_a_script_is_inert(folder: Path) -> None:
    with open_page() as page:
        page.goto((folder / "report.html").as_uri())
        page.locator("#time").focus()
        page.keyboard.press("ArrowLeft")
        page.wait_for_timeout(200)
        assert page.title() == "student – report of a run"  # noqa: RUF001 - the page's own dash
        page.locator("figcaption summary").click()
        assert page.locator("figcaption li").first.inner_text() == HOSTILE
        assert page.locator("script").count() == 2
        page.evaluate("() => { const made = document.createElement('script'); made.textContent = 'document.title = 1';"
                      "document.body.append(made); }")  # fmt: skip
        assert page.title() != "1"  # not even a script that came in somehow would run


def test_the_page_fits_a_telephone_in_the_dark(folder: Path) -> None:
    with open_page(viewport={"width": 360, "height": 700}, color_scheme="dark") as page:
        page.goto((folder / "report.html").as_uri())
        page.wait_for_selector(".chart svg path.line")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", background))) < 150


def test_the_page_names_no_folder_of_this_machine(folder: Path, prompts_file: Path) -> None:
    text = (folder / "report.html").read_text()
    assert str(folder.parent) not in text and str(prompts_file.parent) not in text
    assert "prompts.txt" in text


def test_each_end_of_a_run_has_its_page(teacher_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_update(self, trainer, health) -> None:
            if trainer.state.update == 2:
                raise ValueError("A disk <b>broke</b>; buy one. hf_" + "a" * 30)

    class Stops(Callback):
        def on_update(self, trainer, health) -> None:
            trainer.stop()

    pages = {}
    for name, callbacks in {"failed": [Breaks()], "stopped": [Stops()], "trained": []}.items():
        argv = run_arguments(teacher_folder, prompts_file, tmp_path / name, max_train_steps=3, validation_steps=1)
        with Trainer(parse_args(argv), callbacks) as trainer:
            trainer.load()
            try:
                train_and_report(trainer)
            except ValueError:
                assert name == "failed"
        pages[name] = (tmp_path / name / "report.html").read_text()
    for name, page in pages.items():
        assert f'class="state {name}">{name}<' in page
    assert "A disk &lt;b&gt;broke&lt;/b&gt;; buy one." in pages["failed"] and "hf_a" not in pages["failed"]
    assert "update 2 of 3" in pages["failed"]
    assert "A callback stopped the training." in pages["stopped"]


@pytest.fixture
def long_run(folder: Path, tmp_path: Path):
    """A report of a run of 20,000 updates, whose rows and grids are there."""
    config = parse_args(["--output_dir", str(tmp_path), "--max_train_steps", "20000"])
    for update in range(10, 20001, 10):
        row = {"update": update, **{f"number_{i}": (update * i % 997) / 7 for i in range(30)}}
        append_row(tmp_path / "logs" / "health.jsonl", row)
    (tmp_path / "validation").mkdir()
    for update in range(200, 20001, 200):
        shutil.copy(folder / "validation" / "step-1.png", tmp_path / "validation" / f"step-{update}.png")
    return Report(tmp_path, config.as_arguments(), ["a"])


def test_a_long_run_has_a_small_page_that_is_written_quickly_and_says_what_it_leaves_out(long_run: Report) -> None:
    long_run.write(Status("running", 20000))
    began = time.process_time()
    page = long_run.write(Status("running", 20000)).read_text()
    assert time.process_time() - began < 1
    assert len(page) < 8e6
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert len(shown["grids"]) <= images.MOST_IMAGES and shown["grids"][-1]["update"] == 20000
    assert f"{100 - len(shown['grids'])} of 100 grids are left out here" in page
    assert all(len(line["x"]) <= curves.MOST_POINTS for chart in shown["charts"] for line in chart["lines"])


def test_rows_and_grids_of_a_course_that_was_left_are_not_shown(long_run: Report) -> None:
    page = long_run.as_html(Status("running", 1000))
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert [grid["update"] for grid in shown["grids"]] == [200, 400, 600, 800, 1000]
    assert max(x for chart in shown["charts"] for line in chart["lines"] for x in line["x"]) == 1000


def test_thinning_keeps_both_ends_and_every_extreme() -> None:
    x = list(range(10_000))
    y = [float(i % 7) for i in x]
    y[4321], y[8765] = 100.0, -100.0
    few_x, few_y = curves.thinned(x, y)
    assert len(few_x) <= curves.MOST_POINTS and few_x == sorted(few_x)
    assert {0, 4321, 8765, 9999} <= set(few_x)
    assert all(y[i] == value for i, value in zip(few_x, few_y, strict=True))
    assert curves.thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


def test_a_large_picture_is_made_smaller_and_a_damaged_one_is_left_out(tmp_path: Path) -> None:
    Image.effect_noise((3000, 400), 50).save(tmp_path / "step-1.png")
    (tmp_path / "step-2.png").write_bytes(b"no picture")
    grids, left_out = images.Grids(tmp_path).chosen(until=10)
    assert [grid.update for grid in grids] == [1] and left_out.startswith("1 of 2 grids")
    assert grids[0].source.startswith("data:image/jpeg;base64,") and len(grids[0].source) < 400_000


@pytest.mark.skipif(not (SCREENSHOTS and RUN), reason="needs RDM_SCREENSHOTS=1 and RDM_REPORT_RUN=FOLDER")
def test_the_screenshot_shows_the_report_of_a_real_run() -> None:
    with open_page(viewport={"width": 1200, "height": 1500}) as page:
        page.goto((Path(str(RUN)).resolve() / "report.html").as_uri())
        page.wait_for_selector(".chart svg path.line")
        page.screenshot(path=SCREENSHOT)
