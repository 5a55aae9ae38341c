"""Foreign text in a card: prompts, names, licences and settings are shown as they are written, and are nothing else."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from rdm_diffusers.hub.card import CardFacts, facts_of, render
from rdm_diffusers.hub.card_text import code, escaped, fenced, plain, quoted, results

CARD = Path(__file__).parents[1] / "model_cards" / "tiny-student"
EVIL = (
    "x\n```\n<script>alert(1)</script>\n\n---\nlicense: evil\n---\n| a | b |\n# Head\n![i](http://e.vil/i.png)\x1b[31m"
    "\u202e\u2028</details>`*_`{{ 7 * 7 }} https://me:hunter2@e.vil/?token=abc"
)


@pytest.fixture(scope="module")
def facts() -> CardFacts:
    return facts_of(CARD, "tiny-student")


def card_with(facts: CardFacts, evil: str) -> ModelCard:
    """A card in which all that is foreign is the text."""
    arguments = {**facts.student.arguments, "algorithm": evil, "reward": [evil], "lr_scheduler": evil, "seed": evil}
    training = {**facts.student.training, "command": evil, "arguments": arguments}
    licence = {"license": "other", "license_name": evil, "license_link": evil, "tags": ["evil"]}
    path = evil.split("https")[0].replace("/", ":")  # of a file or a folder
    student = replace(
        facts.student, base_model_name_or_path=f"/home/me/{path}", version=evil, revision=evil, variant=evil,
        license=licence, training=training,
    )  # fmt: skip
    metrics = {**facts.metrics, "machine": evil, "prompts": [evil] * 8}
    evaluation = {
        "settings": {"features": {"name": evil}, evil: evil}, "metrics": {evil: 1.5},
        "context": {"arguments": {"prompts": evil}},
    }  # fmt: skip
    changed = {"prompts": [evil] * 8, "comfyui": f"comfyui/{path}.safetensors", "metrics": metrics}
    return render(replace(facts, name=evil, student=student, evaluation=evaluation, **changed))


def test_nothing_that_is_foreign_becomes_markup_code_or_metadata(facts: CardFacts) -> None:
    harmless, evil = card_with(facts, "harmless"), card_with(facts, EVIL)
    for pattern in (r"^ {0,3}`{3,}", r"^#", r"^---", r"^\|", r"^!\["):
        count = [len(re.findall(pattern, str(card), re.MULTILINE)) for card in (harmless, evil)]
        assert count[0] == count[1], pattern
    assert len(harmless.text.splitlines()) == len(evil.text.splitlines())
    outside = re.sub(r"```.*?^```$|`[^`\n]+`", "", evil.text, flags=re.DOTALL | re.MULTILINE)
    for marked in ("<script", "</details", "![i]", "hunter2", "token=abc", "\x1b", "\u202e", "\u2028"):
        assert marked not in outside
    assert "hunter2" not in str(evil) and "token=abc" not in str(evil) and "49" not in outside.split("## Results")[0]


def test_metadata_survive_foreign_text(facts: CardFacts) -> None:
    data = ModelCard(str(card_with(facts, EVIL))).data
    assert data.license == "other" and "evil" not in data.tags
    assert data.library_name == "diffusers" and len(data.widget) == 8
    assert all("\n" not in entry["text"] for entry in data.widget)


def test_the_code_in_such_a_card_is_still_the_cards_own(facts: CardFacts) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```$", card_with(facts, EVIL).text, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 2
    harmless = re.findall(r"^```python\n(.*?)^```$", card_with(facts, "x").text, re.DOTALL | re.MULTILINE)
    for snippet, other in zip(snippets, harmless, strict=True):
        kinds = [[type(node).__name__ for node in ast.walk(ast.parse(text))] for text in (snippet, other)]
        assert kinds[0] == kinds[1]


@pytest.mark.parametrize(
    "text", ["a red 7", "sd-turbo_v1.5 (fp16), lr=1e-4: 50%!", "猫が好き", "naïve café", "a_b", "👩\u200d🚀"]
)
def test_usual_text_stays_as_it_is(text: str) -> None:
    assert plain(text) == escaped(text) == text and code(text) == f"`{text}`"


def test_a_cell_with_a_bar_is_one_cell() -> None:
    assert escaped("a|b\\|c") == "a\\|b\\\\\\|c"
    evaluation = {
        "settings": {"features": None}, "metrics": {"a|b\n|c": 1.0}, "context": {"arguments": {"prompts": "p|q"}},
    }  # fmt: skip
    row = results(None, evaluation).splitlines()[2]
    assert len(re.findall(r"(?<!\\)\|", row)) == 4


@pytest.mark.parametrize(
    "text", ['say "hi"', "back\\slash", "```", "a\nb", "\ud800", "\u202e", "\x00", "\U0001f680\U000e0001"]
)
def test_a_quoted_text_is_a_python_string_of_its_own(text: str) -> None:
    written = quoted(text)
    assert ast.literal_eval(written) == text
    assert written.isprintable() and "```" not in written


def test_code_is_fenced_by_more_than_it_holds() -> None:
    assert code("a`b``c") == "```a`b``c```" and code("`x") == "`` `x ``"
    assert fenced("run ```\n```` it", "bash") == "`````bash\nrun ``` ```` it\n`````"
