"""Model cards: what the Hub reads of them, what their readers can paste, and that the committed ones are fresh."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from parts import run_arguments

import train_rdm_lora
from rdm_diffusers.commands import card as command
from rdm_diffusers.evaluation import command as evaluate
from rdm_diffusers.hub import card_facts
from rdm_diffusers.hub.card import TEMPLATE, render
from rdm_diffusers.hub.card_facts import CardFacts, facts_of, license_of
from rdm_diffusers.pipelines import StudentConfig
from rdm_diffusers.tiny import TINY_TEACHER
from rdm_diffusers.training.record import command_line

CARDS = Path(__file__).parents[1] / "model_cards"
MAKE_CARDS: Any = runpy.run_path(str(CARDS / "make_cards.py"))
RELATIONS = {"adapter", "merge", "quantized", "finetune"}  # those that the Hub knows


@pytest.fixture
def student(tiny_student: Path, tmp_path: Path) -> Path:
    """A copy of a student's folder."""
    return shutil.copytree(tiny_student, tmp_path / "student")


def of_teacher(facts: CardFacts, teacher: str) -> CardFacts:
    """The same student as if of another teacher."""
    return replace(facts, student=replace(facts.student, base_model_name_or_path=teacher))


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def test_a_card_survives_the_hubs_own_reading_and_writing(student: Path) -> None:
    card = ModelCard.load(student / "README.md")
    again = ModelCard(f"---\n{ModelCardData(**card.data.to_dict(), ignore_metadata_errors=False).to_yaml()}\n---\n")
    assert again.data.to_dict() == card.data.to_dict()
    assert card.data.pipeline_tag == "text-to-image" and card.data.library_name == "diffusers"
    assert card.data.license == "apache-2.0"
    assert all((student / entry["output"]["url"]).exists() for entry in card.data.widget)
    assert len(card.data.widget) == 2


def test_a_lora_is_an_adapter_and_a_full_student_a_finetune_of_a_teacher_of_the_hub(student: Path) -> None:
    facts = of_teacher(facts_of(student, "me/student"), "owner/teacher")
    training = {"arguments": {**facts.student.arguments, "pretrained_model_name_or_path": "owner/teacher"}}
    full = replace(facts.student, base_model_name_or_path=None, training=training)
    for card, relation in (render(facts), "adapter"), (render(replace(facts, student=full)), "finetune"):
        assert relation in RELATIONS
        assert (card.data.base_model, card.data["base_model_relation"]) == ("owner/teacher", relation)
        assert ("lora" in card.data.tags) == (relation == "adapter")


@pytest.mark.parametrize("teacher", ["tiny", "/home/somebody/teacher"])
def test_a_teacher_that_the_hub_does_not_know_is_no_base_model_there(student: Path, teacher: str) -> None:
    card = render(of_teacher(facts_of(student, "me/student"), teacher))
    assert card.data.base_model is None and card.data.get("base_model_relation") is None


def test_metrics_are_in_the_model_index_with_their_settings(prompts_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "measured"
    train_rdm_lora.main(run_arguments("tiny", prompts_file, folder, num_eval_images=24, steps_per_rollout=2))
    metrics = json.loads((folder / "metrics.json").read_text())["student"]
    card = ModelCard.load(folder / "README.md")
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "measured"
    measured = {result.metric_type: result.metric_value for result in results}
    assert measured == {key: round(metrics[key], 4) for key in ("fd_to_teacher", "fd_to_data", "prompt_accuracy")}
    assert all(result.metric_args["num_images"] == 24 and result.metric_args["nfe"] == 2 for result in results)
    assert f"{metrics['fd_to_data']:.4g}" in card.text


def test_rdm_card_adds_the_numbers_of_an_evaluation(student: Path, tmp_path: Path, capsys) -> None:
    evaluated = tmp_path / "evaluated"
    evaluate.main(["--student", str(student), "--num_images", "4", "--output_dir", str(evaluated)])
    before = (student / "README.md").read_text()
    with pytest.raises(ValueError, match=r"README\.md is there already; replace it with --overwrite"):
        command.main([str(student), "--evaluation", str(evaluated)])
    assert (student / "README.md").read_text() == before
    command.main([str(student), "--evaluation", str(evaluated), "--name", "me/student", "--overwrite"])
    card = ModelCard.load(student / "README.md")
    assert {"tiny_prompt", "tiny_bold"} <= {result.metric_type for result in card.data.eval_results}
    assert all('student = "me/student"' in snippet for snippet in snippets(card.text))
    assert str(student) not in card.text


def test_rdm_card_refuses_a_folder_without_a_student(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no student; give the output folder of a training or of rdm-export"):
        command.main([str(tmp_path)])


def test_the_code_for_diffusers_loads_the_very_base_with_its_own_autoencoder(student: Path, tmp_path: Path) -> None:
    AutoencoderKL.from_pretrained(TINY_TEACHER, subfolder="vae").save_pretrained(tmp_path / "vae")
    config = replace(StudentConfig.load(str(student)), vae=str(tmp_path / "vae"))
    config.save(student)
    stock = snippets(render(facts_of(student, str(student))).text)[1]
    assert f'vae=AutoencoderKL.from_pretrained("{tmp_path}/vae")' in stock
    exec(stock, names := {})
    assert type(names["pipeline"].vae) is AutoencoderKL
    facts = replace(facts_of(student, "me/student"), student=replace(config, revision="v2", variant="fp16", vae=None))
    assert '["tiny"], revision="v2", variant="fp16", vae=' in render(facts).text


@pytest.mark.parametrize(
    ("link", "expected"),
    [("LICENSE.md", "https://huggingface.co/owner/teacher/blob/main/LICENSE.md"), ("https://x.y/z", "https://x.y/z")],
)
def test_the_licence_is_the_teachers(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str, expected: str
) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: other\nlicense_name: theirs\nlicense_link: {link}\n---\n")
    facts = facts_of(student, "me/student")
    local = license_of(of_teacher(facts, str(tmp_path)).student)
    assert local == {"license": "other", "license_name": "theirs", "license_link": link}
    monkeypatch.setattr(card_facts, "fetch", lambda what, teacher, file, revision: tmp_path / file)
    tags = license_of(of_teacher(facts, "owner/teacher").student)
    assert tags == {"license": "other", "license_name": "theirs", "license_link": expected}
    assert license_of(of_teacher(facts, "a-folders-name").student) == {}
    card = render(replace(facts, license=tags))
    assert card.data.license == "other" and "comes under its licence, theirs." in card.text


def test_the_command_in_a_card_has_no_token_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    words = ["--hub_token", "hf_a", "--hub_token=hf_b", f"--prompts_file={tmp_path}/prompts.txt", "--output_dir",
             str(tmp_path / "a b"), "--resume_from_checkpoint", "latest", "--validation_prompt", "a=b"]  # fmt: skip
    shown = command_line("train_rdm_lora.py", words)
    own = "--prompts_file=prompts.txt --output_dir 'a b' --validation_prompt a=b"
    assert shown == f"accelerate launch train_rdm_lora.py {own}"


def test_a_card_tells_its_command_and_its_rewards(student: Path) -> None:
    facts = facts_of(student, "me/student")
    rewarded = {**facts.student.arguments, "reward": ["tiny_bold:2"], "resolution": 64}
    config = replace(facts.student, training={"command": "train it", "arguments": rewarded})
    text = render(replace(facts, student=config)).text
    assert "```bash\ntrain it\n```" in text
    assert "also trained towards rewards (tiny_bold:2)" in text and "trained at 64 x 64 pixels" in text


def test_a_student_whose_training_nobody_wrote_down_has_a_card_all_the_same(student: Path) -> None:
    path = student / "rdm_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "training": {}}))
    command.main([str(student), "--overwrite"])
    text = (student / "README.md").read_text()
    assert "{{" not in text and "accelerate launch" not in text and len(snippets(text)) == 2


def test_the_template_beside_the_cards_is_the_one_that_is_used() -> None:
    assert (CARDS / "template.md").resolve() == TEMPLATE.resolve()


def test_the_finished_card_is_what_its_folder_tells() -> None:
    folder, name = CARDS / "tiny-student", "tiny-student"  # committed without the weights
    facts = replace(facts_of(folder, name), comfyui=f"comfyui/{name}.safetensors")
    assert (folder / "README.md").read_text() == str(render(facts))
    assert len(facts.pictures) == len(facts.prompts) == 8 and facts.metrics["student"]["num_images"] == 5000


@pytest.mark.parametrize("name", MAKE_CARDS["STUDENTS"])
def test_the_waiting_cards_are_fresh_and_say_that_nothing_is_trained_yet(name: str) -> None:
    text = (CARDS / "waiting" / f"{name}.md").read_text()
    assert text == MAKE_CARDS["waiting_card"](name)
    assert "**Not trained yet.**" in text and "samples.png" not in text
    data = ModelCard(text).data
    assert data.base_model and data["base_model_relation"] == "adapter" and data.license and not data.eval_results
    for snippet in snippets(text):
        compile(snippet, name, "exec")
