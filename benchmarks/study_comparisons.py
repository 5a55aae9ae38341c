"""The comparisons of `method_study.py`: variants by name, as flags of `train_rdm_lora.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TEACHERS = ("tiny", "tiny-flow", "tiny-v")
STUDIED = ("tiny", "tiny-flow")
RATES: dict[str, dict[str, Any]] = {"tiny-flow": dict(learning_rate=2e-3)}  # best for both methods there
# Each at the number of fake-score updates that was best for it in grids of one seed.
DMD, GNDM = dict(algorithm="dmd", fake_updates_per_step=5), dict(algorithm="gndm", fake_updates_per_step=1)
# Student and fake score start at the target, and only the fake score has to be quick.
TARGET: dict[str, Any] = dict(
    teacher_target="samples", guidance_scale=4.0, fake_score_steps=True, fake_learning_rate=1e-3, lr_scheduler="cosine",
    ema_decay=0.99, target_train_steps=1000,
)  # fmt: skip
# The best of such grids with a target, for DMD and for GNDM.
TUNED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        dict(learning_rate=5e-4, fake_updates_per_step=2, fake_learning_rate=2e-3),
        dict(learning_rate=1e-3, fake_updates_per_step=1, fake_learning_rate=2e-3),
    ),
    "tiny-flow": (
        dict(learning_rate=1e-3, fake_updates_per_step=2, fake_learning_rate=4e-3),
        dict(learning_rate=2e-3, fake_updates_per_step=1, fake_learning_rate=2e-3),
    ),
    "tiny-v": (
        dict(learning_rate=5e-4, fake_updates_per_step=2, fake_learning_rate=2e-3),
        dict(learning_rate=5e-4, fake_updates_per_step=1),
    ),
}


@dataclass(frozen=True)
class Comparison:
    """Variants by name, the first of which the others are compared with.

    Args:
        variants: flags of `train_rdm_lora.py` by variant.
        budget: network calls of each run.
        marks: how many times a run is measured.
        images: pictures per measurement.
        about: what the comparison asks.
    """

    about: str
    variants: dict[str, dict[str, Any]]
    budget: int = 24_000
    marks: int = 1
    images: int = 960
    teachers: tuple[str, ...] = STUDIED


DECISIONS: dict[str, dict[str, Any]] = {
    "GNDM": GNDM,
    "DMD, 5 fake updates": DMD,
    "DMD, 1 fake update": dict(DMD, fake_updates_per_step=1),
    "no correction": dict(GNDM, gndm_lambda=0.0),
    "half the correction": dict(GNDM, gndm_lambda=0.5),
    "correction in noise units": dict(GNDM, bias_estimator="noise"),
    "correction by each step alone": dict(GNDM, pool_steps=0.0),
    "correction by all steps": dict(GNDM, pool_steps=1.0),
    "normaliser by sample": dict(GNDM, advantage_normalization="sample"),
    "2 re-noisings": dict(GNDM, num_renoisings=2),
    "groups of 2": dict(GNDM, group_size=2),
    "groups of 8": dict(GNDM, group_size=8),
    "2 fake updates": dict(GNDM, fake_updates_per_step=2),
    "5 fake updates": dict(GNDM, fake_updates_per_step=5),
    "fake score told the step": dict(GNDM, fake_score_steps=True),
}


def reused(*counts: int, **flags: Any) -> dict[str, dict[str, Any]]:
    """Students of 8 steps, of whose rollouts one state is trained on: each rollout for N updates, by each weighting."""
    base = dict(GNDM, num_student_steps=8, steps_per_rollout=1, **flags)
    return {"N 1": base} | {
        f"N {n}, {weighting}": dict(base, reuse_rollouts=n, importance_weighting=weighting)
        for n in counts
        for weighting in ("none", "clipped", "self_normalized")
    }


COMPARISONS = {
    "main": Comparison(
        "GNDM's default against DMD, each at its best learning rate and number of fake updates",
        {"DMD": DMD, "GNDM": GNDM},
        budget=60_000,
        marks=6,
        teachers=TEACHERS,
    ),
    **{
        f"target, {teacher}": Comparison(
            "GNDM against DMD with a target learnt from the teacher's images at guidance 4, at their best rates",
            {"DMD": DMD | TARGET | dmd, "GNDM": GNDM | TARGET | gndm},
            budget=40_000,
            images=2400,
            teachers=(teacher,),
        )
        for teacher, (dmd, gndm) in TUNED.items()
    },
    "decisions": Comparison("what each choice of GNDM's default brings, one changed at a time", DECISIONS),
    "reuse": Comparison(
        "one rollout for N updates, with and without importance ratios, where rollouts are dear",
        reused(2, 4, 8),
        marks=2,
    ),
    "reuse, quick": Comparison("the same at four times the learning rate", reused(4, 8, rate_ratio=4), marks=2),
}
