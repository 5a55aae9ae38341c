"""The reward that reads: text that was really drawn and is really read, against what the prompt quotes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import run_arguments
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rdm_diffusers import Trainer
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.rewards import evaluate, load_reward
from rdm_diffusers.rewards.ocr import TextReward, passage_distance, quoted_texts, score

pytest.importorskip("rapidocr_onnxruntime", reason="the extra ocr is for Python up to 3.12")
SIGN = 'a shop sign that says "OPEN"'


def drawn(text: str, colour: str = "black", background: str = "white", size: int = 256) -> Tensor:
    """A picture `[3, size, size]` of a text in its middle."""
    picture = Image.new("RGB", (size, size), background)
    place = {"anchor": "mm", "align": "center", "font": ImageFont.load_default(size // 6), "fill": colour}
    ImageDraw.Draw(picture).multiline_text((size / 2, size / 2), text, **place)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def reward() -> Iterator[TextReward]:
    """The reward, by its name."""
    return load_reward("ocr:0.5", "cpu").reward


@pytest.fixture(scope="module")
def scores(reward: TextReward) -> dict[str, float]:
    """What pictures of texts get for a prompt that asks for OPEN, as one batch."""
    texts = ["OPEN", "open", "OPEN\nDAILY", "OPIN", "CLOSED", "SHUT", ""]
    values = evaluate(reward, torch.stack([drawn(text) for text in texts]), [SIGN] * len(texts))
    return dict(zip(texts, values.tolist(), strict=True))


def test_the_right_text_scores_1_whatever_its_case_and_whatever_else_is_written(scores) -> None:
    assert scores["OPEN"] == scores["open"] == scores["OPEN\nDAILY"] == 1


def test_a_wrong_letter_costs_its_share_other_words_more_and_no_text_everything(scores) -> None:
    assert scores["OPIN"] == 0.75
    assert scores["SHUT"] <= scores["CLOSED"] < scores["OPIN"]
    assert scores[""] == 0


def test_a_score_depends_on_neither_the_batch_nor_the_time(reward: TextReward, scores) -> None:
    for text in ("CLOSED", "OPIN"):
        assert evaluate(reward, drawn(text)[None], [SIGN]).tolist() == [scores[text]]


def test_several_texts_several_lines_and_colours_are_read(reward: TextReward) -> None:
    pictures = [drawn("GRAND\nOPENING"), drawn("PUSH\nPULL", "white", "darkred"), drawn("7 UP", "yellow", "navy")]
    prompts = ["a banner with 'Grand Opening'", "doors, “push” and “pull”", "a can of «7 up»"]
    assert evaluate(reward, torch.stack(pictures), prompts).tolist() == [1, 1, 1]


def test_a_prompt_that_quotes_nothing_has_no_score(reward: TextReward) -> None:
    values = evaluate(reward, drawn("OPEN")[None].repeat(2, 1, 1, 1), ["a dog's park", SIGN])
    assert values[0].isnan() and values[1] == 1


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('"Open" and “late”', ["open", "late"]),
        ("a cat's sign that says 'don't stop'", ["don'tstop"]),
        ("‘it’s’ «x» „y“ 「開」", ["it's", "x", "y", "開"]),  # noqa: RUF001
        ("the dogs' park, it's a dog's day", []),
        ('an empty sign, "" or " "', []),
        ('"ＦＵＬＬ ﬁt"', ["fullfit"]),  # noqa: RUF001 - other forms of marks and letters are the claim
    ],
)
def test_what_a_prompt_quotes(prompt: str, texts: list[str]) -> None:
    assert quoted_texts(prompt) == texts


def test_the_distance_is_to_the_nearest_passage() -> None:
    cases = {("abc", "abc"): 0, ("abc", "xxabcxx"): 0, ("abc", "xxacxx"): 1, ("abc", "abxc"): 1, ("abc", ""): 3}
    assert {pair: passage_distance(*pair) for pair in cases} == cases
    assert passage_distance("abc", "xyz" * 9) == 3
    assert score(["ab", "cd"], "xabx") == 0.5


def test_it_reads_with_no_more_threads_than_torch_has(reward: TextReward) -> None:
    for part in (reward.engine.text_det.infer, reward.engine.text_rec.session, reward.engine.text_cls.infer):
        assert 1 <= part.session.get_session_options().intra_op_num_threads <= torch.get_num_threads()


def test_without_its_package_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'rdm-diffusers\[ocr\]'"):
        load_reward("ocr", "cpu")
    with pytest.raises(ValueError, match="The reward ocr has no weights to choose"):
        load_reward("ocr=weights.onnx", "cpu")


def test_a_run_tilts_its_target_by_what_is_read(teacher_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a sign that says "one"\na sign that says nothing\n')
    flags = dict(algorithm="gndmr", reward="ocr", max_train_steps=1, train_batch_size=8)
    with Trainer(parse_args(run_arguments(teacher_folder, prompts, tmp_path / "student", **flags))) as trainer:
        trainer.check()
        assert "the reward ocr" in trainer.plan().not_counted
        assert trainer.train().updates == 1
        assert copy.deepcopy(trainer.rewards[0].reward) is trainer.rewards[0].reward
