"""The student's README.md, a model card made from what lies in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..families import FAMILIES
from .card_facts import CARD, CardFacts, facts_of
from .card_metrics import eval_results, results

TEMPLATE = Path(__file__).parent / "card_template.md"


def write_card(folder: Path, name: str | None = None) -> None:
    """Writes `README.md` into a student's folder.

    Args:
        folder: the student's.
        name: what the card tells its reader to load it by; the folder's path by default.

    Raises:
        ValueError: if the folder holds no student, or its teacher's configuration cannot be had.
    """
    render(facts_of(folder, name or str(folder))).save(folder / CARD)


def render(facts: CardFacts) -> ModelCard:
    """The card of a student."""
    student, scheduler_class = facts.student, facts.scheduler["_class_name"]
    absent = [f"{name}=None" for name in facts.absent]
    call = {"num_inference_steps": student.num_inference_steps, **student.call_arguments}
    classes = [student.pipeline_class, *([scheduler_class] if student.is_lora else []), facts.vae_class]
    return ModelCard.from_template(
        card_data(facts),
        template_path=str(TEMPLATE),
        facts=facts,
        student=student,
        teacher_link=_teacher_link(facts),
        license_name=facts.license.get("license_name") or facts.license.get("license"),
        name=quoted(facts.name),
        prompt=quoted(facts.prompts[0]),
        scheduler_class=scheduler_class,
        imports=", ".join(sorted(filter(None, classes))),
        base_arguments=", ".join([*_base_arguments(facts), *absent]),
        full_arguments=", ".join(["student", *absent]),
        call_arguments=", ".join(f"{name}={value}" for name, value in call.items()),
        comfyui_shift=FAMILIES[student.pipeline_class].comfyui_shift,
        results=results(facts.metrics, facts.evaluation),
        hyperparameters=hyperparameters(facts),
    )


def card_data(facts: CardFacts) -> ModelCardData:
    """The metadata that the Hub reads."""
    student = facts.student
    tags = ["diffusers", *(["lora"] if student.is_lora else []), "text-to-image", "distillation", "few-step", "rdm"]
    optional: dict[str, Any] = dict(facts.license)
    if not facts.is_local:
        relation = "adapter" if student.is_lora else "finetune"
        optional |= {"base_model": student.teacher, "base_model_relation": relation}
    measured = eval_results(facts.metrics, facts.evaluation)
    if measured:
        optional |= {"model_name": Path(facts.name).name, "eval_results": measured}
    shown = [{"text": text, "output": {"url": url}} for text, url in zip(facts.prompts, facts.pictures, strict=False)]
    widget = shown or [{"text": facts.prompts[0]}]
    return ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, widget=widget, **optional)


def hyperparameters(facts: CardFacts) -> dict[str, str]:
    """What was trained, in words; empty if nobody wrote it down."""
    own = facts.student.arguments
    if not own:
        return {}
    batch = own["train_batch_size"] * own["gradient_accumulation_steps"] * own.get("num_processes", 1)
    size = f"LoRA, rank {own['rank']}, alpha {own['lora_alpha']}" if facts.student.is_lora else "full weights"
    rewards = {"rewards": f"{', '.join(own['reward'])}; share {own['reward_share']}"} if own["reward"] else {}
    average = {"moving average": f"decay {own['ema_decay']}"} if own["use_ema"] else {}
    return {
        "student": f"{size}; {own['num_student_steps']} steps, eta {own['eta']}",
        "R_dm": f"{own['algorithm']}, groups of {own['group_size']}, lambda {own['gndm_lambda']}, "
                f"teacher's guidance {own['guidance_scale']}",
        **rewards,
        "updates": f"{facts.student.training.get('updates', own['max_train_steps'])}, of {batch} samples",
        "fake score's updates": f"{own['fake_updates_per_step']} to each of the student's",
        "optimiser": f"AdamW{' in 8 bits' if own['use_8bit_adam'] else ''}, learning rate {own['learning_rate']}, "
                     f"{own['lr_scheduler']}",
        **average,
        "precision": "float32" if own["mixed_precision"] == "no" else own["mixed_precision"],
        "seed": str(own["seed"]),
        **({"made with": f"rdm-diffusers {facts.student.version}"} if facts.trained else {}),
    }  # fmt: skip


def _base_arguments(facts: CardFacts) -> list[str]:
    """What stock diffusers loads the base model of a LoRA by, as code."""
    student = facts.student
    base = f"TINY_TEACHERS[{quoted(student.teacher)}]" if facts.is_embedded else quoted(student.teacher)
    vae = [f"vae={facts.vae_class}.from_pretrained({quoted(student.vae)})"] if facts.vae_class else []
    options = {"revision": student.revision, "variant": student.variant}
    return [base, *(f"{name}={quoted(value)}" for name, value in options.items() if value), *vae]


def quoted(text: str | None) -> str:
    """A Python string."""
    return json.dumps(text, ensure_ascii=False)


def _teacher_link(facts: CardFacts) -> str:
    if facts.is_local:
        return f"{'the embedded teacher ' if facts.is_embedded else ''}`{facts.teacher}`"
    return f"[{facts.teacher}](https://huggingface.co/{facts.teacher})"
