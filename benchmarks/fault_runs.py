"""Scenes of whole commands: a training run and an evaluation, killed and repeated, or reading damaged files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from fault_scenes import DamageScene, KillScene, content, equal, hidden, same_result
from fault_trials import DEBRIS, INTACT, LOST, SILENT, Verdict

import train_rdm_lora
from rdm_diffusers.evaluation import command as evaluation
from rdm_diffusers.tiny.captions import CAPTIONS
from rdm_diffusers.training.checkpoint_files import find_checkpoint

PROMPTS = CAPTIONS[7::60]
WEIGHTS = "pytorch_lora_weights.safetensors"


def train(folder: Path, *more: str, updates: int = 2) -> dict[str, Any]:
    """The student's weights after a run of a few updates into `folder/run`; `more` flags override the first ones."""
    words = [
        "--pretrained_model_name_or_path", "tiny", "--output_dir", str(folder / "run"), "--max_train_steps",
        str(updates), "--teacher_target", "score",
        "--checkpointing_steps", "1", "--train_batch_size", "8", "--group_size", "2", "--rank", "2",
        "--num_student_steps", "2", "--steps_per_rollout", "1", "--num_validation_images", "1", "--num_eval_images",
        "0", "--monitor_images", "0", "--validation_steps", "1000", "--report_to", "none",
        "--lr_scheduler", "constant", "--cache_dir", str(folder / "cache"), *more,
    ]  # fmt: skip
    train_rdm_lora.main(words)
    return content(folder / "run" / WEIGHTS)


def _prompts(folder: Path) -> list[str]:
    return ["--prompts_file", str(folder / "prompts.txt")]


def _dataset(folder: Path) -> list[str]:
    return ["--dataset_name", str(folder / "captions"), "--caption_column", "text"]


def _write_prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "captions").mkdir()
    (folder / "captions" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))


def _fresh(folder: Path) -> Path:
    _write_prompts(folder)
    return folder


@cache
def _straight() -> dict[str, Any]:
    """The student and the hidden files of a run that nothing disturbed."""
    folder = _fresh(Path(mkdtemp(prefix="faults-straight-")))
    return {"weights": train(folder, *_prompts(folder)), "hidden": hidden(folder / "run")}


def _carry_on(folder: Path, more: list[str]) -> Verdict:
    resume = ["--resume_from_checkpoint", "latest"] if any((folder / "run").glob("checkpoint-*")) else []
    weights = train(folder, *more, *resume)
    if not equal(weights, _straight()["weights"]):
        return Verdict(SILENT, "the run ended otherwise than an undisturbed one")
    left = hidden(folder / "run") - _straight()["hidden"]
    return Verdict(DEBRIS, ", ".join(sorted(left))) if left else Verdict(INTACT)


RUN = KillScene(
    "a whole run", _write_prompts, lambda folder: train(folder, *_prompts(folder)),
    lambda folder: _carry_on(folder, _prompts(folder)), _straight, most=30,
)  # fmt: skip


def _was_trained(source: Callable[[Path], list[str]]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        _write_prompts(folder)
        train(folder, *source(folder))

    return prepare


def _resumed(source: Callable[[Path], list[str]]) -> Callable[[Path], Any]:
    """One more update of the run; the prompts' embeddings come from the cache."""
    return lambda folder: train(folder, *source(folder), "--resume_from_checkpoint", "latest", updates=3)


def _damaged_run(name: str, source: Callable[[Path], list[str]], file: str) -> DamageScene:
    return DamageScene(name, _was_trained(source), [file], _resumed(source), same_result, rounds=2)


def evaluate(folder: Path) -> dict[str, Any]:
    """Six pictures of the tiny teacher in two steps, measured against files; its metrics."""
    words = [
        "--teacher", "tiny", "--num_inference_steps", "2", "--num_images", "6", "--batch_size", "2", "--prompts",
        str(folder / "prompts.txt"), "--output_dir", str(folder / "measured"), "--reference_teacher",
        str(folder / "reference_teacher.safetensors"), "--reference_data", str(folder / "reference_data"),
    ]  # fmt: skip
    record = evaluation.main(words)
    assert record is not None
    return record["metrics"]


@cache
def references() -> Path:
    """The statistics and images that an evaluation wrote."""
    folder = Path(mkdtemp(prefix="faults-references-"))
    evaluation.main(
        ["--teacher", "tiny", "--num_inference_steps", "1", "--num_images", "4", "--output_dir", str(folder)]
    )
    return folder


def _before_evaluating(folder: Path) -> None:
    _write_prompts(folder)
    shutil.copy(references() / "reference_teacher.safetensors", folder)
    shutil.copytree(references() / "images", folder / "reference_data")


def _unmeasured(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name != "images_per_second"}


@cache
def _evaluated() -> dict[str, Any]:
    folder = Path(mkdtemp(prefix="faults-evaluated-"))
    _before_evaluating(folder)
    return {"metrics": evaluate(folder), "names": sorted(path.name for path in (folder / "measured").rglob("*"))}


def _judge_evaluation(folder: Path) -> Verdict:
    metrics = evaluate(folder)
    if not equal(_unmeasured(metrics), _unmeasured(_evaluated()["metrics"])):
        return Verdict(SILENT, "other numbers than those of an undisturbed evaluation")
    written = content(folder / "measured" / "evaluation.json")
    if not isinstance(written, dict) or not equal(written["metrics"], metrics):
        return Verdict(LOST, "evaluation.json is not whole")
    left = {path.name for path in (folder / "measured").rglob("*")} - set(_evaluated()["names"])
    return Verdict(DEBRIS, ", ".join(sorted(left))) if left else Verdict(INTACT)


def _after_evaluating(folder: Path) -> None:
    _before_evaluating(folder)
    evaluate(folder)


def _same_metrics(result: Any, expected: Any, damaged: str) -> bool:
    """Speeds change if an image is drawn again. If they are damaged, they may only be unknown or unchanged."""
    speeds = (None, expected["images_per_second"])
    honest = not damaged.startswith("speed-") or result["images_per_second"] in speeds
    return honest and equal(_unmeasured(result), _unmeasured(expected))


def _compared(folder: Path) -> str:
    record = evaluation.read_json(folder / "measured")
    return evaluation.compare(record, record)


def _go_back(folder: Path) -> dict[str, Any]:
    """Resumes from the first of three checkpoints with another learning rate."""
    other = ["--learning_rate", "3e-3", "--resume_from_checkpoint", "checkpoint-1"]
    return train(folder, *_prompts(folder), *other, updates=3)


def _three_updates(folder: Path) -> None:
    _write_prompts(folder)
    train(folder, *_prompts(folder), updates=3)


@cache
def _branches() -> dict[str, Any]:
    """The students in the checkpoints of the first run, those of the repeated run, and the repeated run's weights."""
    folder = Path(mkdtemp(prefix="faults-back-"))
    _three_updates(folder)
    before = _students(folder)
    end = _go_back(folder)
    files = [folder / "run" / f"checkpoint-{update}" / "student.safetensors" for update in (2, 3)]
    return {"before": before, "again": list(map(content, files)), "end": end}


def _students(folder: Path) -> list[Any]:
    """Those of all checkpoints, also of those that were set aside."""
    return [content(path) for path in sorted((folder / "run").rglob("student.safetensors"))]


def _among(tensors: Any, others: list[Any]) -> bool:
    return any(equal(tensors, other) for other in others)


def _judge_going_back(folder: Path) -> Verdict:
    """No checkpoint of the first run is gone, and the latest one is of the repeated run once that has any."""
    there, branches = _students(folder), _branches()
    gone = sum(not _among(student, there) for student in branches["before"])
    if gone:
        return Verdict(LOST, f"{gone} of the three earlier checkpoints are gone")
    latest = content(find_checkpoint(folder / "run", "latest") / "student.safetensors")
    written = [content(path) for path in (folder / "run").glob("checkpoint-*/student.safetensors")]
    if any(_among(student, written) for student in branches["again"]) and not _among(latest, branches["again"]):
        return Verdict(SILENT, "the latest checkpoint is one of the way that was left")
    if not equal(_go_back(folder), branches["end"]):
        return Verdict(SILENT, "the run ended otherwise than an undisturbed one")
    latest = content(find_checkpoint(folder / "run", "latest") / "student.safetensors")
    return Verdict(INTACT if equal(latest, branches["again"][-1]) else SILENT, "the latest checkpoint after the end")


KILLS = [
    RUN,
    KillScene("a run that goes back", _three_updates, _go_back, _judge_going_back, _branches, most=12),
    KillScene("an evaluation", _before_evaluating, evaluate, _judge_evaluation, _evaluated, most=50),
    KillScene(
        "an evaluation of pictures that are there", _after_evaluating, evaluate, _judge_evaluation, _evaluated, most=20
    ),
]  # fmt: skip
DAMAGE = [
    _damaged_run("the prompts of a resumed run", _prompts, "prompts.txt"),
    _damaged_run("the dataset of a resumed run", _dataset, "captions/train.jsonl"),
    _damaged_run("the cached embeddings of a resumed run", _prompts, "cache/rdm_embeddings/*/*"),
    DamageScene(
        "an evaluation that goes on", _after_evaluating,
        ["prompts.txt", "reference_teacher.safetensors", "measured/images/000003.png", "measured/*.json",
         "measured/*.jsonl", "measured/evaluation.md"], evaluate, _same_metrics, rounds=2,
    ),
    DamageScene(  # only the user knows how many images of theirs there should be
        "an evaluation against pictures", _after_evaluating, ["reference_data/000001.png"], evaluate, _same_metrics,
        kinds=("flipped", "cut", "emptied", "zeroed"),
    ),
    DamageScene(
        "evaluations that are compared", _after_evaluating, ["measured/evaluation.json"], _compared, same_result,
        kinds=("cut", "emptied", "missing", "zeroed"), rounds=2,
    ),
]  # fmt: skip
