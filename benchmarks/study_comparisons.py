"""The comparisons of `method_study.py`: variants by name, as flags of `train_rdm_lora.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TEACHERS = ("tiny", "tiny-flow", "tiny-v")
STUDIED = ("tiny", "tiny-flow")
RATES: dict[str, dict[str, Any]] = {"tiny-flow": dict(learning_rate=2e-3)}  # best for both methods there
# Each at the number of fake-score updates that was best for it in `tuning`.
DMD, GNDM = dict(algorithm="dmd", fake_updates_per_step=5), dict(algorithm="gndm", fake_updates_per_step=1)
BOLD = dict(GNDM, algorithm="gndmr", reward="tiny_bold")
QUICK = dict(DMD, fake_updates_per_step=2, fake_rate_ratio=2)
BLACK_BOX = dict(BOLD, reward="benchmarks/study_rewards.py:bold_black_box")
DMDR = dict(DMD, algorithm="gndmr", preset="dmd2", reward="tiny_bold", reward_combination="sum")
# Student and fake score start at the target, and only the fake score has to be quick.
TARGET: dict[str, Any] = dict(
    teacher_target="samples", guidance_scale=4.0, fake_score_steps=True, fake_learning_rate=1e-3, lr_scheduler="cosine",
    ema_decay=0.99, target_train_steps=1000,
)  # fmt: skip
# The best of the three grids `tuning, target`, for DMD and for GNDM.
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
WEIGHTS, SHARES = (0.1, 0.3, 1.0), (0.05, 0.1, 0.2, 0.4)  # of rewards in `pareto, target`
LAMBDAS = {"0": dict(gndm_lambda=0.0), "0.25": dict(gndm_lambda=0.25), "0.5": dict(gndm_lambda=0.5),
           "1": dict(gndm_lambda=1.0), "James-Stein": dict(gndm_lambda="james_stein"),
           "1 pooled": dict(gndm_lambda=1.0, debias_pool=4)}  # fmt: skip
# Flags of release 0.1.0 only. Their finished runs are still summarised; no new ones are started.
RETIRED = (
    {"gndm_lambda": "james_stein"}, {"debias_pool": 4}, {"black_box_form": "group"}, {"black_box_form": "perturbation"},
)  # fmt: skip


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


def rates(best: float) -> dict[str, dict[str, Any]]:
    """Learning rates x4 around the best one with 1, 2 and 5 fake updates; and fake scores that learn faster."""
    grid = {
        f"{base['algorithm']}, lr {rate:g}, {fake} fake updates": dict(
            base, learning_rate=rate, fake_updates_per_step=fake
        )
        for base in (DMD, GNDM)
        for rate in (best / 2, best, best * 2)
        for fake in (1, 2, 5)
    }
    return grid | {
        f"{base['algorithm']}, lr {best:g}, fake score's x {ratio}, {fake} fake updates": dict(
            base, learning_rate=best, fake_updates_per_step=fake, fake_learning_rate=ratio * best
        )
        for base in (DMD, GNDM)
        for ratio in (2,)
        for fake in (1, 2)
    }


def target_rates(fake_rate: float) -> dict[str, dict[str, Any]]:
    """Learning rates and fake updates where student and fake score start at a target that is learnt."""
    grid = {
        f"{base['algorithm']}, lr {rate:g}, {fake} fake updates": dict(
            base, **TARGET | {"fake_learning_rate": fake_rate}, learning_rate=rate, fake_updates_per_step=fake
        )
        for base in (DMD, GNDM)
        for rate in (2.5e-4, 5e-4, 1e-3, 2e-3)
        for fake in (1, 2, 5)
    }
    return grid | {
        f"{base['algorithm']}, lr {rate:g}, fake score's x 2, {fake} fake updates": dict(
            base, **TARGET | {"fake_learning_rate": 2 * fake_rate}, learning_rate=rate, fake_updates_per_step=fake
        )
        for base in (DMD, GNDM)
        for rate in (5e-4, 1e-3)
        for fake in (1, 2)
    }


COMPARISONS = {
    "main": Comparison(
        "GNDM's default against DMD, each at its best learning rate and number of fake updates of `tuning`",
        {"DMD": DMD, "GNDM": GNDM, "DMD, 2 quicker fake updates": QUICK},
        budget=60_000,
        marks=6,
        teachers=TEACHERS,
    ),
    "tuning": Comparison("learning rates and fake updates", rates(1e-3), budget=40_000, marks=2, teachers=("tiny",)),
    "tuning, flow": Comparison("the same", rates(2e-3), budget=40_000, marks=2, teachers=("tiny-flow",)),
    "lambda": Comparison(
        "the strength of the correction against the number of fake updates",
        {
            f"lambda {name}, {fake} fake updates": dict(GNDM, fake_updates_per_step=fake, **flags)
            for fake in (1, 2, 5)
            for name, flags in LAMBDAS.items()
        },
    ),
    "ablation": Comparison(
        "which reading of the group brings what, at 1 fake update",
        {
            "DMD": dict(DMD, fake_updates_per_step=1),
            "group normaliser alone": dict(GNDM, gndm_lambda=0.0),
            "std normaliser alone": dict(preset="gndm-literal", fake_updates_per_step=1),
            "k-conditioned fake score alone": dict(DMD, fake_updates_per_step=1, fake_score_steps=True),
            "correction alone": dict(GNDM, advantage_normalization="sample"),
            "correction in noise units": dict(GNDM, bias_estimator="noise"),
            "correction and group normaliser": GNDM,
            "all three": dict(GNDM, fake_score_steps=True),
            "correction by each step alone": dict(GNDM, pool_steps=0.0),
            "correction by all steps": dict(GNDM, pool_steps=1.0),
            "2 re-noisings": dict(GNDM, num_renoisings=2),
        },
    ),
    "pooling": Comparison(
        "the share of the bias that is measured over all states of a rollout, in longer runs",
        {"half": GNDM} | {name: dict(GNDM, pool_steps=share) for name, share in (("none", 0.0), ("all", 1.0))},
        budget=60_000,
        marks=6,
    ),
    "groups": Comparison(
        "the group's size, at 1 fake update",
        {"G 4": GNDM} | {f"G {size}": dict(GNDM, group_size=size) for size in (2, 8)},
    ),
    "steps": Comparison(
        "students of fewer steps, at 1 fake update",
        {
            f"{steps} steps, lambda {strength}": dict(
                GNDM, num_student_steps=steps, steps_per_rollout=steps, gndm_lambda=strength
            )
            for steps in (1, 2)
            for strength in (0.0, 1.0)
        },
    ),
    "guided": Comparison(
        "the teacher guided by 2 in R_dm, measured against its samples under its own, stronger guidance",
        {"DMD": dict(DMD, guidance_scale=2.0), "GNDM": dict(GNDM, guidance_scale=2.0)},
        budget=60_000,
        marks=6,
    ),
    **{
        name: Comparison(
            "learning rates and fake updates with a target learnt from the teacher's images at guidance 4",
            target_rates(fake_rate),
            budget=40_000,
            images=2400,
            teachers=(teacher,),
        )
        for name, teacher, fake_rate in (
            ("tuning, target", "tiny", 1e-3),
            ("tuning, target, flow", "tiny-flow", 2e-3),
            ("tuning, target, v", "tiny-v", 1e-3),
        )
    },
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
    "pareto, target": Comparison(
        "GNDMR against DMDR's weighted sum, and against the same sum with GNDM, with such a target",
        {f"DMDR {w:g}": DMDR | TARGET | TUNED["tiny"][0] | {"reward": f"tiny_bold:{w:g}"} for w in WEIGHTS}
        | {
            f"sum {w:g}": BOLD | TARGET | TUNED["tiny"][1] | {"reward": f"tiny_bold:{w:g}", "reward_combination": "sum"}
            for w in WEIGHTS
        }
        | {f"GNDMR {rho:g}": BOLD | TARGET | TUNED["tiny"][1] | {"reward_share": rho} for rho in SHARES},
        budget=40_000,
        images=2400,
        teachers=("tiny",),
    ),
    "pareto": Comparison(
        "GNDMR against DMDR's weighted sum, and against the same sum with GNDM: tiny_bold against the distance",
        {f"DMDR {w:g}": dict(DMDR, reward=f"tiny_bold:{w:g}") for w in (0.03, 0.1, 0.3, 1.0)}
        | {f"sum {w:g}": dict(BOLD, reward=f"tiny_bold:{w:g}", reward_combination="sum") for w in (0.1, 0.3, 1.0)}
        | {f"GNDMR {rho:g}": dict(BOLD, reward_share=rho) for rho in (0.05, 0.1, 0.2, 0.4)},
    ),
    "rewards": Comparison(
        "rewards scaled, conflicting, and as black boxes",
        {
            "share 0.2": dict(BOLD, reward_share=0.2),
            "share 0.2, guarded": dict(BOLD, reward_share=0.2, projection_guard=True),
            "share 0.2, reward x 100": dict(BOLD, reward="benchmarks/study_rewards.py:bold_100"),
            "no reward": GNDM,
            "prompt and bold": dict(BOLD, reward=["tiny_prompt", "tiny_bold"]),
        }
        | {f"black box, {form}": dict(BLACK_BOX, black_box_form=form) for form in ("group", "perturbation")}
        | {f"black box, tilt {kappa:g}": dict(BLACK_BOX, reward_tilt=kappa) for kappa in (0.25, 0.5, 1.0)},
    ),
    "reuse": Comparison(
        "one rollout for N updates, with and without importance weights",
        {"N 1": GNDM}
        | {
            f"N {n}, {weighting}": dict(GNDM, reuse_rollouts=n, importance_weighting=weighting)
            for n in (2, 4, 8)
            for weighting in ("none", "clipped")
        },
    ),
}
