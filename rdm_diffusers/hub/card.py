"""The student's README.md, a model card that is made from the files in its folder.

The metadata are huggingface_hub's `ModelCardData`. The text has a template of our own, because neither `ModelCard` nor
diffusers' `load_or_create_model_card` escapes foreign text (prompts, names, licences) in what it fills in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment
from safetensors import SafetensorError, safe_open

from ..families import CARD, FAMILIES, LORA_FILE, absent_components, family_of, pipeline_config
from ..pipelines import StudentConfig, stock_grid
from ..pipelines.student_config import REMEDY
from ..schedulers import RdmScheduler
from ..tiny import is_tiny
from ..untrusted import described, write_inside
from .card_base import (
    DTYPE,
    adapter_arguments,
    base_code,
    base_id,
    base_link,
    base_name,
    imported,
    lora_arguments,
    lora_sentence,
)
from .card_method import Paper, method_name, paper_of, reads_images
from .card_text import (
    EVALUATION_FILE,
    LICENSE_TAGS,
    METRICS_FILE,
    Markdown,
    code,
    escaped,
    eval_results,
    fenced,
    optimizer_text,
    plain,
    prompt_argument,
    quoted,
    read_measurements,
    results,
)
from .comfyui import comfyui_node, comfyui_sampler, comfyui_sigmas
from .student_files import read_scheduler, student_files

TEMPLATE = Path(__file__).parent / "card_template.md"
NEW_CARD = "README.new.md"
PROMPT = "a photograph of an astronaut riding a horse"  # if no prompts are recorded
TINY_PROMPT = "a red seven on a blue background"
MARK = "\n<!-- written by rdm-diffusers; edited since, if this is not its digest: {} -->\n"
# The table of the training. A row is left out if one of its values is unknown.
ROWS = {
    "student": "{size}; {num_student_steps} steps, eta {eta}",
    "started from": "{init_lora}",
    "teacher's LoRAs": "{teacher_loras}",
    "R_dm": "{algorithm}, groups of {group_size}, lambda {gndm_lambda}, teacher's guidance {guidance_scale}",
    "consistency": "{num_solver_steps} steps of the teacher's solver, huber_c {huber_c}, guidance {guidance_scale}",
    "target": "learnt from {target}",
    "rewards": "{rewards}; share {reward_share}",
    "updates": "{updates}, of {batch} samples",
    "fake score's updates": "{fake_updates_per_step} to each of the student's",
    "optimiser": "{optimiser}, {lr_scheduler}",
    "moving average": "decay {decay}",
    "precision": "{precision} in training",
    "weights": "{weights_dtype}",
    "seed": "{seed}",
    "made with": "rdm-diffusers {version}",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card states."""

    name: str  # the folder or Hub id that readers load the student by
    student: StudentConfig
    scheduler: Mapping[str, Any]  # the configuration of its stock scheduler
    index: Mapping[str, Any] = field(default_factory=dict)  # `pipeline_config` of the base model, or of a full student
    absent: Sequence[str] = ()  # components that the base model, or a full student, was saved without
    vae_class: str | None = None  # the autoencoder's class, if it is not the base model's autoencoder
    prompts: Sequence[str] = (PROMPT,)  # of the pictures; without pictures one example
    pictures: Sequence[str] = ()  # their paths in the folder, one for each prompt
    comfyui: str | None = None  # path of the file for ComfyUI, if there is one and ComfyUI can load the base model
    weights_dtype: str | None = None  # of the student's weights in the folder, for example `float32`
    samples: bool = False  # whether there is a `samples.png`
    metrics: Mapping[str, Any] | None = None  # the contents of this file, if it exists
    evaluation: Mapping[str, Any] | None = None  # likewise
    trained: bool = True  # False for a card that is written before the training

    @property
    def teacher(self) -> str:
        """The base model's name, never its local path."""
        return base_name(self.student)

    @property
    def is_lcm(self) -> bool:
        """Whether it was trained by consistency distillation, without R_dm."""
        return self.student.arguments.get("algorithm") == "lcm"

    @property
    def method(self) -> str:
        """The name of the method."""
        return method_name(self.student.arguments)

    @property
    def paper(self) -> Paper | None:
        """The paper of the method where it is another than R_dm's."""
        return paper_of(self.student.arguments)

    @property
    def reads_images(self) -> bool:
        """Whether it was trained with images, and not from prompts alone."""
        return reads_images(self.student.arguments)

    @property
    def is_embedded(self) -> bool:
        """Whether this package includes the base model."""
        return is_tiny(self.student.teacher or "")


def facts_of(folder: Path, name: str) -> CardFacts:
    """The facts about a student in a folder; some are read from its base model."""
    student = StudentConfig.load(str(folder))
    family_of({"_class_name": student.pipeline_class})
    source = student.base_configuration if student.is_lora else str(folder.resolve())
    config, metrics = pipeline_config(source, revision=student.revision), read_measurements(folder / METRICS_FILE)
    embedded = is_tiny(student.teacher or "")
    return CardFacts(
        name=name,
        student=student,
        scheduler=read_scheduler(folder),
        index=config,
        absent=list(absent_components(config)),
        vae_class=config["vae"][1] if student.vae else None,
        prompts=(metrics or {}).get("prompts") or [TINY_PROMPT if embedded else PROMPT],
        pictures=sorted(_paths(folder, "pictures/*.png"), key=lambda path: (len(path), path)),
        comfyui=None if embedded else next(_paths(folder, "comfyui/*.safetensors"), None),
        weights_dtype=_dtype_of(folder, student),
        samples=(folder / "samples.png").exists(),
        metrics=metrics,
        evaluation=read_measurements(folder / EVALUATION_FILE),
    )


def _paths(folder: Path, pattern: str) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.glob(pattern))


def _dtype_of(folder: Path, student: StudentConfig) -> str | None:
    """The dtype of a student's weights; None without weights."""
    pattern = LORA_FILE if student.is_lora else f"{FAMILIES[student.pipeline_class].denoiser_name}/*.safetensors"
    for path in folder.glob(pattern):
        try:
            with safe_open(path, "pt") as file:
                return str(file.get_tensor(next(iter(file.keys()))).dtype).removeprefix("torch.")
        except (OSError, SafetensorError, StopIteration) as error:
            raise ValueError(f"{path} is damaged ({described(error)}); {REMEDY}.") from error
    return None


def write_card(folder: Path, name: str | None = None, overwrite: bool = False) -> Path:
    """Writes a student's card.

    Args:
        folder: the student's.
        name: the name that readers load the student by; the folder's path by default.
        overwrite: whether to replace even a card that somebody has edited.

    Returns:
        The file: `README.md`, or `README.new.md` beside a card that somebody has edited.

    Raises:
        ValueError: if the folder holds no student, a damaged one, or links that leave it, or if the teacher's
            configuration cannot be read.
    """
    student_files(folder)  # first, because it refuses links out of the folder
    text, card = str(render(facts_of(folder, name or str(folder)))), folder / CARD
    replace = overwrite or not card.exists() or is_untouched(card.read_text("utf-8", "replace"))
    return write_inside(folder, CARD if replace else NEW_CARD, f"{text}{MARK.format(_digest_of(text))}")


def is_untouched(card: str) -> bool:
    """Whether a card is as it was written, by the digest at its end."""
    text, mark, digest = card.rpartition(MARK.split("{")[0])
    return bool(mark) and digest.startswith(_digest_of(text))


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def render(facts: CardFacts) -> ModelCard:
    """The card of a student."""
    student, scheduler_class = facts.student, facts.scheduler["_class_name"]
    absent = [f"{name}=None" for name in facts.absent]
    grid = stock_grid(RdmScheduler.from_config(student.scheduler), FAMILIES[student.pipeline_class])
    call = {**(grid or {"num_inference_steps": student.num_inference_steps}), **student.call_arguments}
    classes = [student.pipeline_class, *([scheduler_class] if student.is_lora else []), facts.vae_class]
    classes += imported(student, facts.index)
    template = Environment(finalize=escaped).from_string(TEMPLATE.read_text("utf-8"))
    content = template.render(
        card_data=Markdown(_card_data(facts).to_yaml()),
        facts=facts,
        student=student,
        command=fenced(student.training["command"], "bash") if student.training.get("command") else None,
        teacher_link=base_link(student),
        license_name=student.license.get("license_name") or student.license.get("license"),
        name=quoted(facts.name),
        prompt=prompt_argument(student.pipeline_class, facts.prompts[0]),
        scheduler_class=scheduler_class,
        imports=Markdown(", ".join(sorted(filter(None, classes)))),
        base_code=Markdown(base_code(student, facts.index, absent, facts.vae_class)) if student.is_lora else "",
        base_loras=[lora_arguments(lora) for lora in student.loras],
        adapters=Markdown(adapter_arguments(student.loras)),
        lora_sentence=lora_sentence(student),
        full_arguments=Markdown(", ".join(["student", *absent, DTYPE])),
        call_arguments=Markdown(", ".join(f"{name}={value}" for name, value in call.items())),
        comfyui_file=code(facts.comfyui),
        comfyui_link=Markdown(quote(facts.comfyui or "")),
        grid=next(iter(grid), None),
        comfyui_sampler=comfyui_sampler(student),
        comfyui_node=Markdown(comfyui_node(student) or ""),
        comfyui_sigmas=", ".join(f"{sigma:.6g}" for sigma in comfyui_sigmas(student)),
        results=results(facts.metrics, facts.evaluation),
        hyperparameters=hyperparameters(facts),
    )
    return ModelCard(content)


def _card_data(facts: CardFacts) -> ModelCardData:
    """The metadata for the Hub."""
    student = facts.student
    tags = ["diffusers", *(["lora"] if student.is_lora else []), "text-to-image", "distillation", "few-step", "rdm"]
    optional: dict[str, Any] = {tag: plain(student.license[tag]) for tag in LICENSE_TAGS if tag in student.license}
    if base := base_id(student):
        relation = "adapter" if student.is_lora else "finetune"
        optional |= {"base_model": base, "base_model_relation": relation}
    measured = eval_results(facts.metrics, facts.evaluation)
    if measured:
        optional |= {"model_name": Path(plain(facts.name)).resolve().name, "eval_results": measured}
    prompts = [plain(prompt) for prompt in facts.prompts]
    shown = [{"text": text, "output": {"url": url}} for text, url in zip(prompts, facts.pictures, strict=False)]
    widget = shown or [{"text": prompts[0]}]
    return ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, widget=widget, **optional)


def hyperparameters(facts: CardFacts) -> dict[str, str]:
    """The rows of `ROWS` whose values are all known."""
    entries = {**facts.student.arguments, **_derived(facts)}
    values = {name: value for name, value in entries.items() if value is not None}
    needed = {label: {name for _, name, _, _ in Formatter().parse(row) if name} for label, row in ROWS.items()}
    return {label: row.format(**values) for label, row in ROWS.items() if values.keys() >= needed[label]}


def _derived(facts: CardFacts) -> dict[str, Any]:
    """The values in the rows that are no arguments of the run; None if unknown."""
    own, training = facts.student.arguments, facts.student.training
    sizes = [own.get(name) for name in ("train_batch_size", "gradient_accumulation_steps", "num_processes")]
    lora = f"LoRA, rank {own.get('rank')}, alpha {own.get('lora_alpha')}{'' if facts.student.is_lora else ', fused'}"
    precision = own.get("mixed_precision")
    idle = dict.fromkeys(("group_size", "fake_updates_per_step")) if facts.is_lcm else {}
    return {
        **idle,
        "num_solver_steps": own.get("num_ddim_timesteps") if facts.is_lcm else None,
        "size": {"lora": lora, "full": "full weights"}.get(own.get("student", "")),
        "rewards": ", ".join(own.get("reward") or []) or None,
        "teacher_loras": ", ".join(own.get("teacher_lora") or []) or None,
        "target": _target(own) if own.get("teacher_target") == "samples" else None,
        "updates": training.get("updates"),
        "batch": None if None in sizes else math.prod(sizes),
        "optimiser": optimizer_text(own),
        "decay": own.get("ema_decay") if training.get("averaged") else None,
        "precision": "float32" if precision == "no" else precision,
        "weights_dtype": facts.weights_dtype,
        "version": facts.student.version if facts.trained else None,
    }


def _target(own: Mapping[str, Any]) -> str:
    """The images that a run's target learnt from."""
    drawn = f"{own.get('num_target_images')} images that the teacher drew in {own.get('target_inference_steps')} steps"
    if not (own.get("train_data_dir") or own.get("image_column")):
        return drawn
    return "images of its maker" + (f" and {drawn}" if own.get("target_weight", 1) != 1 else "")
