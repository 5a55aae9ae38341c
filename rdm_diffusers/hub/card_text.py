"""The text of cards: foreign text becomes markdown, code or metadata only here; measurements, and the licence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult

from ..config.optimizers import EIGHT_BIT, OPTIMIZERS, USUAL
from ..evaluation.records import JSON_FILE as EVALUATION_FILE, flattened, number, rows_of, table
from ..families import CARD, FAMILIES, fetch
from ..tiny import is_tiny
from ..tiny.domains import domain_of
from ..untrusted import described, is_kind, read_object, without_secrets

METRICS_FILE = "metrics.json"
REMEDY = "fix or remove it"
MAX_CHARACTERS = 2**16  # of the beginning of a base model's card
MAX_BRACKETS = 500  # in its metadata; PyYAML's time grows with the square of their number
LICENSE_TAGS = ("license", "license_name", "license_link")
JOINERS = "\u200c\u200d"  # not printable, but a part of words and of emoji
# A backslash does not disable `&` and `<`; `_` inside words has no meaning.
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")


class Markdown(str):
    """Text that is markdown, and is not escaped again."""


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


def plain(text: Any) -> str:
    """A text in one line, without control characters, passwords and tokens; for metadata."""
    line = re.sub(r"\s+", " ", str(text))
    return without_secrets("".join(letter for letter in line if letter.isprintable() or letter in JOINERS))


def escaped(text: Any) -> Markdown:
    """A text that a card shows as it is: no markup, no HTML, no link, no end of a table's cell."""
    if isinstance(text, Markdown):
        return text
    marked = SPECIAL.sub(lambda found: f"\\{found[0]}", plain(text))
    return Markdown("".join(ENTITIES.get(letter, letter) for letter in marked).replace("://", "&#58;//"))


def code(text: Any) -> Markdown:
    """A text as inline code; not for a table's cell, which a `|` in it would end."""
    inside = plain(text)
    ticks = "`" * (_longest_run(inside) + 1)
    space = " " if inside[:1] == "`" or inside[-1:] == "`" or not inside else ""
    return Markdown(f"{ticks}{space}{inside}{space}{ticks}")


def fenced(text: Any, language: str) -> Markdown:
    """One line of code in a block of its own."""
    inside = plain(text)
    ticks = "`" * max(3, _longest_run(inside) + 1)
    return Markdown(f"{ticks}{language}\n{inside}\n{ticks}")


def quoted(text: str | None) -> Markdown:
    """A Python string literal; invisible characters, and backticks that could end the code, become escapes."""
    written = json.dumps(text and without_secrets(text), ensure_ascii=False)
    hidden = {"`"} if "```" in written else set()
    return Markdown("".join(_escape(each) if each in hidden or not each.isprintable() else each for each in written))


def prompt_argument(pipeline_class: str, prompt: str) -> Markdown:
    """The prompt as an argument of a stock pipeline's call: by its name, if another argument comes first."""
    _, first, *_ = signature(FAMILIES[pipeline_class].pipeline_class.__call__).parameters
    return Markdown(("" if first == "prompt" else "prompt=") + quoted(prompt))


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _escape(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"


def read_measurements(path: Path) -> dict[str, Any] | None:
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
    measured: list[EvalResult] = []
    if metrics and metrics["student"]["num_images"]:
        student = metrics["student"]
        features = domain_of(metrics["arguments"]["pretrained_model_name_or_path"]).name
        settings: dict[str, Any] = {"num_images": student["num_images"], "features": features, "nfe": student["nfe"]}
        measured = [
            EvalResult(
                metric_type=name, metric_name=COLUMNS[name], metric_value=round(student[name], 4),
                metric_args=settings, **TASK, **CAPTIONS,
            )
            for name in ("fd_to_teacher", "fd_to_data", "prompt_accuracy")
        ]  # fmt: skip
    if not evaluation:
        return measured
    prompts = plain(_prompts(evaluation))
    settings = {
        plain(name): plain(value) if isinstance(value, str) else value
        for name, value in flattened(evaluation["settings"])
        if isinstance(value, int | str)
    }
    return measured + [
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
    return f"{_table(['', *(COLUMNS[name] for name in columns)], lines)}\n\n{note}"


def _table_of_evaluation(evaluation: Mapping[str, Any]) -> str:
    rows = rows_of(evaluation["metrics"]).items()
    lines = [[name, number(value), interval] for name, (value, _, interval) in rows]
    features = (evaluation["settings"]["features"] or {}).get("name", "none")
    note = f"By `rdm-evaluate`: prompts {escaped(_prompts(evaluation))}, features {escaped(features)}."
    return f"{_table(['', 'value', '95% interval'], lines)}\n\n{note} All settings: `{EVALUATION_FILE}`."


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return "\n".join(table(list(map(escaped, head)), [list(map(escaped, row)) for row in rows]))


def _prompts(evaluation: Mapping[str, Any]) -> str:
    return evaluation["context"]["arguments"].get("prompts") or "given pictures"


def license_of(name_or_path: str, revision: str | None = None) -> dict[str, str]:
    """Those of `LICENSE_TAGS` that a base model's card has; none if there is no readable card.

    A student has the licence of its base model.

    Args:
        name_or_path: an embedded teacher's name, a folder, or a Hub id.
        revision: of a Hub repository.
    """
    if is_tiny(name_or_path):
        return {"license": "apache-2.0"}
    folder = Path(name_or_path)
    try:
        path = folder / CARD if folder.is_dir() else fetch("teacher", name_or_path, CARD, revision=revision)
        data = _card_metadata(path)
    except (ValueError, OSError, yaml.YAMLError, RecursionError):
        return {}
    tags = {tag: data[tag] for tag in LICENSE_TAGS if isinstance(data.get(tag), str)}
    link = tags.get("license_link", "")
    if "://" in link and not link.startswith(("https://", "http://")):
        del tags["license_link"]
    elif link and "://" not in link:  # a file beside the card
        del tags["license_link"]
        if not folder.is_dir():
            tags["license_link"] = f"https://huggingface.co/{name_or_path}/blob/main/{link}"
    return tags


def _card_metadata(card: Path) -> dict[str, Any]:
    """The metadata at the top of a card.

    `ModelCard` would hang on metadata that are nested deep, or that refer to parts of themselves and so multiply a few
    lines until no memory holds them; here those raise an error, as unreadable ones do.
    """
    with open(card, encoding="utf-8") as file:
        lines = file.read(MAX_CHARACTERS).splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        raise ValueError("it has no metadata")
    head = "\n".join(lines[1 : lines.index("---", 1)])
    if head.count("[") + head.count("{") > MAX_BRACKETS:
        raise ValueError("its metadata are nested deep")
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(head)):
        raise ValueError("its metadata refer to themselves")
    data = yaml.safe_load(head)
    return data if isinstance(data, dict) else {}


def optimizer_text(arguments: Mapping[str, Any]) -> str | None:
    """The optimiser of a run and its learning rate; None if that is unknown."""
    rate, scaled = arguments.get("learning_rate"), arguments.get("scale_lr")
    name = EIGHT_BIT[0] if arguments.get("use_8bit_adam") else arguments.get("optim")
    kind = OPTIMIZERS.get(str(name), OPTIMIZERS[USUAL])
    times = " times the samples of an update" if scaled else ""
    return None if rate is None else f"{kind.label}, learning rate {rate}{times}"
