"""What R_dm moves the student towards."""

from __future__ import annotations

from dataclasses import dataclass

from ..bounds import STEPS, OneOf, real, whole
from .fields import flag

TARGETS = ("score", "samples")


# fmt: off
@dataclass(frozen=True)
class TargetConfig:
    """The target: the teacher's guided score, or one that is learnt from the images that it draws, or from others."""

    teacher_target: str = flag(
        "score", "score: the teacher's score at --guidance_scale; samples: the score of the images that the teacher "
        "draws at --guidance_scale, or of your own, which a LoRA on it learns first", OneOf(TARGETS))
    num_target_images: int = flag(4800, "images of the teacher that the target learns from", whole("[40, 10000000]"))
    target_inference_steps: int = flag(25, "deterministic steps in which the teacher draws each of them", STEPS)
    target_train_steps: int = flag(1000, "updates of the target, at most", whole("[1, 1000000]"))
    target_batch_size: int | None = flag(
        None, "images in one update of the target, over all processes; as many as the student's update has samples, by "
        "default", whole("[1, 65536]"))
    target_learning_rate: float = flag(
        1e-4, "the target's, which decays to 0", real("(0, inf)"))
    target_weight: float = flag(
        1.0, "share of the user's images in what the target learns; the rest are the teacher's", real("(0, 1]"))
    center_crop: bool = flag(False, "crop the user's images in their middle, not at random")
    random_flip: bool = flag(False, "let the target learn the user's images mirrored, too")
    target_rank: int = flag(None, "rank of the target's LoRA; the student's, or 64, by default", whole("[1, 8192]"))
# fmt: on
