"""The measurements in a student's folder, as the Hub's metadata and as tables for readers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation.records import JSON_FILE as EVALUATION_FILE, flattened, number, rows_of
from ..untrusted import described, is_kind, read_object
from .markdown import Markdown, cells, escaped, plain

METRICS_FILE = "metrics.json"
REMEDY = "fix or remove it"
COLUMNS = {
    "nfe": "network calls",
    "fd_to_teacher": "Fréchet distance to the teacher",
    "fd_to_data": "Fréchet distance to the data",
    "prompt_accuracy": "prompt accuracy",
    "seconds_per_image": "seconds per image",
    "num_images": "pictures",
}
COSTS = {"num_images", "nfe", "images_per_second"}  # metrics of an evaluation that measure no quality
ROWS = {"teacher": "teacher", "teacher_few_step": "teacher at few steps", "student": Markdown("**student**")}
TASK: dict[str, Any] = {"task_type": "text-to-image", "task_name": "Text to image"}
CAPTIONS: dict[str, Any] = {
    "dataset_type": "rdm-tiny-captions",
    "dataset_name": "Captions of the embedded tiny teachers",
}


def read_record(path: Path) -> dict[str, Any] | None:
    """A student's `metrics.json` or `evaluation.json`; None if there is none.

    Raises:
        ValueError: if it is damaged, or lacks what a card needs.
    """
    if not path.exists():
        return None
    record = read_object(path, REMEDY)
    metrics, evaluation = (record, None) if path.name == METRICS_FILE else (None, record)
    try:  # reads all that a card needs, so that wrong entries are reported before a card is written
        prompts = (metrics or {}).get("prompts") or []
        if not is_kind(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("its prompts are no list of texts")
        results(metrics, evaluation), eval_results(metrics, evaluation)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} is damaged ({described(error)}); {REMEDY}.") from error
    return record


def eval_results(metrics: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None) -> list[EvalResult]:
    """The Hub's `model-index`, from a run's `metrics.json` and from `evaluation.json` of `rdm-evaluate`."""
    measured = []
    if metrics and metrics["student"]["num_images"]:
        student = metrics["student"]
        settings = {"num_images": student["num_images"], "features": "tiny", "nfe": student["nfe"]}
        for name in ("fd_to_teacher", "fd_to_data", "prompt_accuracy"):
            value = round(student[name], 4)
            measured.append(
                EvalResult(
                    metric_type=name, metric_name=COLUMNS[name], metric_value=value, metric_args=settings,
                    **TASK, **CAPTIONS,
                )
            )  # fmt: skip
    return measured + (_eval_results_of_evaluation(evaluation) if evaluation else [])


def _eval_results_of_evaluation(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    prompts = plain(_prompts(evaluation))
    settings = {
        plain(name): plain(value) if isinstance(value, str) else value
        for name, value in flattened(evaluation["settings"])
        if isinstance(value, int | str)
    }
    return [
        EvalResult(
            metric_type=plain(name), metric_value=round(value, 4), metric_args=settings,
            dataset_type=prompts, dataset_name=f"Prompts: {prompts}", **TASK,
        )
        for name, (value, _, _) in rows_of(evaluation["metrics"]).items()
        if value is not None and name not in COSTS
    ]  # fmt: skip


def results(metrics: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None) -> Markdown:
    """The same as markdown tables with their settings; empty if nothing was measured."""
    tables = [_table_of_metrics(metrics)] if metrics else []
    return Markdown("\n\n".join([*tables, *([_table_of_evaluation(evaluation)] if evaluation else [])]))


def _table_of_metrics(metrics: Mapping[str, Any]) -> str:
    rows = {label: metrics[name] for name, label in ROWS.items()}
    columns = [name for name in COLUMNS if any(row[name] for row in rows.values())]
    lines = [[label, *(number(row[name]) for name in columns)] for label, row in rows.items()]
    scale = metrics["arguments"]["sample_guidance_scale"]
    teacher, few = metrics["teacher"]["sampler"], metrics["teacher_few_step"]["sampler"]
    note = f"The teacher at guidance {escaped(scale)} by {escaped(teacher)}, at few steps by {escaped(few)}."
    if metrics["student"]["num_images"]:
        note += " Distances, the lower the better, in the features of a small classifier."
    note += f" Seconds on {escaped(metrics['machine'])}. All settings: `{METRICS_FILE}`."
    return f"{cells(['', *(COLUMNS[name] for name in columns)], lines)}\n\n{note}"


def _table_of_evaluation(evaluation: Mapping[str, Any]) -> str:
    rows = rows_of(evaluation["metrics"]).items()
    lines = [[name, number(value), interval] for name, (value, _, interval) in rows]
    features = (evaluation["settings"]["features"] or {}).get("name", "none")
    note = f"By `rdm-evaluate`: prompts {escaped(_prompts(evaluation))}, features {escaped(features)}."
    return f"{cells(['', 'value', '95% interval'], lines)}\n\n{note} All settings: `{EVALUATION_FILE}`."


def _prompts(evaluation: Mapping[str, Any]) -> str:
    return evaluation["context"]["arguments"].get("prompts") or "given pictures"
