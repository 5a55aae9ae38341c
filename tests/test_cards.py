"""Model cards: what the Hub reads of them, what their readers can paste, and that the committed ones are fresh."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from parts import PROMPTS, run_arguments

import train_rdm_full
import train_rdm_lora
from rdm_diffusers.commands import card as command, export
from rdm_diffusers.config.presets import ALGORITHM_PRESETS
from rdm_diffusers.config.record import command_line
from rdm_diffusers.evaluation import command as evaluate
from rdm_diffusers.hub import card_text
from rdm_diffusers.hub.card import TEMPLATE, CardFacts, facts_of, hyperparameters, is_untouched, render
from rdm_diffusers.hub.card_method import PAPERS, method_name, paper_of
from rdm_diffusers.hub.card_text import license_of
from rdm_diffusers.pipelines import StudentConfig
from rdm_diffusers.tiny import TINY_TEACHER

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


def test_metrics_are_in_the_model_index_with_their_settings() -> None:
    metrics = json.loads((CARDS / "tiny-student" / "metrics.json").read_text())["student"]
    card = ModelCard.load(CARDS / "tiny-student" / "README.md")
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "tiny-student"
    measured = {result.metric_type: result.metric_value for result in results}
    assert measured == {key: round(metrics[key], 4) for key in ("fd_to_teacher", "fd_to_data", "prompt_accuracy")}
    assert all(result.metric_args["num_images"] == 5000 and result.metric_args["nfe"] == 4 for result in results)
    assert f"{metrics['fd_to_data']:.4g}" in card.text


def test_rdm_card_adds_the_numbers_of_an_evaluation(student: Path, tmp_path: Path) -> None:
    evaluated, prompts = tmp_path / "evaluated", tmp_path / "captions.txt"
    prompts.write_text("\n".join(PROMPTS))
    words = ["--num_images", "4", "--output_dir", str(evaluated), "--prompts", str(prompts), "--reward", "tiny_bold"]
    evaluate.main(["--student", str(student), *words])
    command.main([str(student), "--evaluation", str(evaluated), "--name", "me/student"])
    card = ModelCard.load(student / "README.md")
    assert {result.metric_type for result in card.data.eval_results} == {
        "fd_to_teacher",
        "fd_to_data",
        "prompt_accuracy",
        "tiny_bold",
    }
    assert card.data.eval_results[0].dataset_name == "Prompts: captions.txt"
    assert all('student = "me/student"' in snippet for snippet in snippets(card.text))
    assert str(tmp_path) not in str(card) + (student / "evaluation.json").read_text()


def test_a_card_that_was_edited_stays_and_the_new_one_lies_beside_it(student: Path, capsys) -> None:
    card, new = student / "README.md", student / "README.new.md"
    command.main([str(student), "--name", "me/first"])
    assert '"me/first"' in card.read_text() and not new.exists()
    card.write_text(card.read_text().replace("## Use", "## How I use it"))
    edited = card.read_text()
    command.main([str(student), "--name", "me/second"])
    assert card.read_text() == edited and '"me/second"' in new.read_text()
    assert "as README.md was edited; replace that with --overwrite" in capsys.readouterr().out
    command.main([str(student), "--name", "me/third", "--overwrite"])
    assert '"me/third"' in card.read_text()


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
    theirs = {"license": "other", "license_name": "theirs"}
    assert license_of(str(tmp_path)) == theirs | ({"license_link": link} if "://" in link else {})
    monkeypatch.setattr(card_text, "fetch", lambda what, teacher, file, revision: tmp_path / file)
    tags = license_of("owner/teacher", "main")
    assert tags == {**theirs, "license_link": expected}
    facts = facts_of(student, "me/student")
    card = render(replace(facts, student=replace(facts.student, license=tags)))
    assert card.data.license == "other" and "comes under its licence, theirs." in card.text


@pytest.mark.parametrize(
    "head", ["tags: [a", "license:\t mit", "license: [mit, apache-2.0]", "license_link: 5", "", "- a"]
)
def test_a_teachers_card_that_cannot_be_read_tells_no_licence(tmp_path: Path, head: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    assert license_of(str(tmp_path)) == {}


def test_a_folder_that_is_called_as_an_embedded_teacher_is_not_taken_for_it(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(teacher_folder, tmp_path / "tiny")
    (tmp_path / "tiny" / "README.md").write_text("---\nlicense: mit\n---\n")
    train_rdm_full.main(run_arguments(tmp_path / "tiny", prompts_file, tmp_path / "full", rank=None))
    card = ModelCard.load(tmp_path / "full" / "README.md")
    assert (
        card.data.license == "mit" and "embedded" not in card.text and "student of tiny (a local folder)" in card.text
    )
    configs = list((tmp_path / "full").glob("*/*.json"))
    assert len(configs) > 5 and not any(str(tmp_path) in path.read_text() for path in configs)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_code_in_the_card_of_half_precise_weights_runs(kind: str, prompts_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"  # of a teacher whose text encoder was stored in half precision
    train_rdm_lora.main(run_arguments("tiny-v", prompts_file, folder, steps_per_rollout=2))
    words = ["--format", kind, "--dtype", "bfloat16", "--output_dir", str(tmp_path / "half")]
    export.main([str(folder), *words])
    text = (tmp_path / "half" / "README.md").read_text()
    assert "| weights | bfloat16 |" in text and (", fused;" in text) == (kind == "full")
    for snippet in snippets(text) + snippets((folder / "README.md").read_text()):
        exec(snippet, {})


def test_the_command_in_a_card_has_no_token_and_no_folder_of_this_machine() -> None:
    words = ["--hub_token", "hf_a", "--hub_token=hf_b", "--prompts_file=/home/me/prompts.txt", "--output_dir", "/o/a b",
             "--resume_from_checkpoint", "latest", "--reward", "hpsv2=/secret/hps.pt:0.5", "--reward", "../r.py:f:2",
             "--logging_dir", "../../me/logs", "--pretrained_model", "models/mine", "--hub_model_id", "me/a",
             "--validation_prompt", "/imagine a=b/c"]  # fmt: skip
    shown = command_line("train_rdm_lora.py", words)
    assert shlex.split(shown) == [
        "accelerate", "launch", "train_rdm_lora.py", "--prompts_file=prompts.txt", "--output_dir", "a b",
        "--reward", "hpsv2=hps.pt:0.5", "--reward", "r.py:f:2", "--logging_dir", "logs",
        "--pretrained_model", "models/mine", "--hub_model_id", "me/a", "--validation_prompt", "/imagine a=b/c",
    ]  # fmt: skip


def test_a_card_tells_only_what_is_known_of_the_training(student: Path) -> None:
    facts = facts_of(student, "me/student")
    told = {name: value for name, value in facts.student.arguments.items() if name not in ("gndm_lambda", "use_ema")}
    training = {"arguments": told, "averaged": False, "updates": 7}
    rows = hyperparameters(replace(facts, student=replace(facts.student, training=training)))
    assert not {"R_dm", "moving average", "rewards"} & rows.keys()
    assert (
        "target" not in rows
        and rows["updates"] == "7, of 8 samples"
        and rows["student"].startswith("LoRA, rank 2, alpha 2; 2 steps")
    )


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "learnt from 80 images that the teacher drew in 3 steps"),
     ({"train_data_dir": "mine"}, "learnt from images of its maker"),
     ({"image_column": "image", "target_weight": 0.5},
      "learnt from images of its maker and 80 images that the teacher drew in 3 steps")],
    ids=["teacher", "own", "both"],
)  # fmt: skip
def test_a_card_tells_what_the_target_learnt_from(own: dict, expected: str, student: Path) -> None:
    facts = facts_of(student, "me/student")
    told = dict(
        facts.student.arguments, teacher_target="samples", num_target_images=80, target_inference_steps=3, **own
    )
    rows = hyperparameters(replace(facts, student=replace(facts.student, training={"arguments": told})))
    assert rows["target"] == expected


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
    folder = CARDS / "tiny-student"  # committed without the weights
    facts = facts_of(folder, "tiny-student")
    text = (folder / "README.md").read_text()
    assert text.startswith(str(render(replace(facts, weights_dtype="float32")))) and is_untouched(text)
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


def test_every_algorithm_has_its_paper_and_an_unknown_one_is_r_dm() -> None:
    assert set(PAPERS) == set(ALGORITHM_PRESETS)
    assert method_name({"algorithm": "sid", "gndm_lambda": 1.0}) == "SiD with GNDM's correction"
    assert method_name({"algorithm": "gndm", "gndm_lambda": 1.0}) == "GNDM"
    assert paper_of({"algorithm": "gndmr"}) is None and paper_of({"algorithm": "tdm"}).number == "2503.06674"
    assert method_name({"algorithm": "<b>evil"}) == method_name({}) == "R_dm"
