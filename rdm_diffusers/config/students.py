"""What is trained: a LoRA or full weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..bounds import OneOf, Text, whole
from ..families import QUANTIZATIONS
from .fields import flag
from .teacher import LORA

KIND_OF_WEIGHTS = OneOf(tuple(QUANTIZATIONS))
STUDENT_BASES = ("plain", "teacher")


# fmt: off
@dataclass(frozen=True)
class LoraStudentConfig:
    """A student that is a LoRA on the frozen teacher, and the fake score another."""

    kind: ClassVar[str] = "lora"

    rank: int = flag(64, "rank of both LoRAs; by default that of --init_lora", whole("[1, 8192]"), "--lora_rank")
    lora_alpha: int = flag(None, "LoRA alpha; the rank by default", whole("[1, 100000]"))
    lora_layers: str | None = flag(
        None, "comma-separated names of modules, or the ends of their names; a wide set by default",
        Text("names of modules with commas between them"))
    fold_adapters: bool = flag(
        False, "run with W + scale B A instead of separate adapter layers: faster where memory allows")
    quantization: str | None = flag(
        None, "keep the frozen base in so few bits, best with --gradient_checkpointing; the LoRAs stay float32",
        KIND_OF_WEIGHTS, name="base_quantization")
    student_base: str = flag(
        "plain", "with --teacher_lora, what the exported student is a LoRA for: plain, the teacher without that LoRA, "
        "which becomes part of the student; teacher, the teacher with it, so that users load both",
        OneOf(STUDENT_BASES), free=True)
    init_lora: str | None = flag(
        None, "start the student from this LoRA, for example another few-step student: a safetensors file, a folder, a "
        "Hub id, or a Hub id with /FILE.safetensors; the fake score starts from the teacher as always", LORA,
        is_path=True)


@dataclass(frozen=True)
class FullStudentConfig:
    """A student with weights of its own, and a fake score with its own, too."""

    kind: ClassVar[str] = "full"

    quantization: str | None = flag(
        None, "keep the teacher in so few bits; student and fake score stay float32", KIND_OF_WEIGHTS,
        name="teacher_quantization")
# fmt: on
