"""What `few_step_benchmark.py` compares, as tables: methods, teachers, guidance, and the search that every method gets.

A new method or teacher is a line here, for which `few_step_benchmark.py` then starts the runs that are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from study_run import COMMON, command_line

from rdm_diffusers.tiny.reference import REFERENCES

Flags = dict[str, Any]

# How quickly the fake score follows: its updates for one of the student's, and its learning rate over the student's.
PACES: tuple[Flags, ...] = (
    dict(fake_updates_per_step=1, fake_rate_ratio=1),
    dict(fake_updates_per_step=2, fake_rate_ratio=2),
)

# How strong the discriminator is, at the quicker pace: as in the papers' runs on large teachers, and for short runs.
ADVERSARIAL: tuple[Flags, ...] = (PACES[1], dict(PACES[1], guidance_cls_loss_weight=1.0, gen_cls_loss_weight=0.1))


@dataclass(frozen=True)
class Method:
    """A method as flags of `train_rdm_lora.py`.

    Args:
        flags: what makes the method.
        second: the choices beside three learning rates, two for every method.
        corrected: the method that this one is with GNDM's correction.
        guidance: the settings of `GUIDANCE` that it exists for.
    """

    flags: Flags
    second: tuple[Flags, ...] = PACES
    corrected: str | None = None
    guidance: tuple[str, ...] = ("off", "on", "score")


# Samples of one prompt in an update. More prompts serve a method better that asks nothing of the group.
ALONE, GROUP = dict(group_size=1), dict(group_size=4)
CORRECTION = dict(gndm_lambda=1.0, advantage_normalization="group", **GROUP)
PICTURES = dict(num_target_images=2400, target_inference_steps=25)  # of the teacher, for methods that learn from them
BASELINE = "dmd"  # whose paired changes the tables show
METHODS: dict[str, Method] = {
    "dmd": Method(dict(algorithm="dmd", **ALONE)),
    "dmd2": Method(dict(algorithm="dmd2", **ALONE, **PICTURES), ADVERSARIAL),
    "f_distill": Method(dict(algorithm="f_distill", **ALONE, **PICTURES), ADVERSARIAL),
    "uni_instruct": Method(
        dict(algorithm="uni_instruct", **ALONE, **PICTURES),
        second=tuple(dict(pace, f_divergence="reverse_kl") for pace in PACES),  # forward_kl diverges
    ),
    "sid": Method(dict(algorithm="sid", **ALONE)),
    "sim": Method(dict(algorithm="sim", **ALONE)),
    "tdm": Method(dict(algorithm="tdm", **ALONE)),
    "snoopi": Method(dict(algorithm="snoopi", **ALONE), guidance=("score",)),
    "lcm": Method(
        dict(algorithm="lcm", steps_per_rollout=1, fake_score_steps=False, **ALONE, **PICTURES),
        second=(dict(num_ddim_timesteps=50), dict(num_ddim_timesteps=20)),
        guidance=("off", "on"),  # a constant that suits R_dm is not the guidance of a solver
    ),
    "gndm": Method(dict(algorithm="gndm", **GROUP), corrected="dmd"),
    "dmd, eta 0": Method(dict(algorithm="dmd", eta=0.0, **ALONE)),
    "gndm, eta 0": Method(dict(algorithm="gndm", eta=0.0, **GROUP), corrected="dmd, eta 0"),
    "dmd2+gndm": Method(dict(algorithm="dmd2", **CORRECTION, **PICTURES), ADVERSARIAL, corrected="dmd2"),
    "f_distill+gndm": Method(dict(algorithm="f_distill", **CORRECTION, **PICTURES), ADVERSARIAL, corrected="f_distill"),
    "sid+gndm": Method(dict(algorithm="sid", **CORRECTION), corrected="sid"),
    "tdm+gndm": Method(dict(algorithm="tdm", **CORRECTION), corrected="tdm"),
}


@dataclass(frozen=True)
class Subject:
    """An embedded teacher.

    Args:
        learning_rate: the middle one of the three.
        constant: the guidance in R_dm that brings students nearest to the teacher's guided pictures
            (`results/guidance_study.json`).
    """

    learning_rate: float
    constant: float


TEACHERS: dict[str, Subject] = {
    "tiny": Subject(learning_rate=1e-3, constant=1.5),
    "tiny-flow": Subject(learning_rate=2e-3, constant=4.0),
    "tiny-v": Subject(learning_rate=1e-3, constant=2.0),
}


@dataclass(frozen=True)
class Guidance:
    """The teacher's guidance, and what follows from it for every method alike.

    Args:
        is_guided: whether students are measured against the teacher's guided pictures, those of its reference.
        flags: of what they are led to.
        rate: a factor of the learning rates.
        ratio: a factor of the fake score's learning rate over the student's.
    """

    is_guided: bool
    flags: Flags
    rate: float = 1.0
    ratio: float = 1.0


GUIDANCE: dict[str, Guidance] = {
    "off": Guidance(False, dict(teacher_target="score")),
    # Student and fake score start at the target, so the student has less to learn, and the fake score has to be quick.
    "on": Guidance(
        True,
        dict(
            teacher_target="samples", fake_score_steps=True, target_train_steps=500,
            target_batch_size=128, target_learning_rate=2e-3, target_rank=64, **PICTURES,
        ),
        rate=0.5, ratio=2.0,
    ),
    "score": Guidance(True, dict(teacher_target="score")),  # guided by the teacher's constant
}  # fmt: skip
RATES = (0.5, 1.0, 2.0)  # times the teacher's and the guidance's
STEPS = (1, 2, 4, 8)
SEARCH_SEED = 1000  # is none of the seeds that are compared
PICTURED_SEED, PICTURED_STEPS = 0, (1, 4)


def scale_of(teacher: str, guidance: str) -> float:
    """The guidance of the teacher's pictures that students are measured against."""
    return REFERENCES[teacher].guidance_scale if GUIDANCE[guidance].is_guided else 1.0


@dataclass(frozen=True)
class Plan:
    """The sizes of all runs.

    Args:
        calls: network calls of a run.
        search_calls: those of a run of the search.
        images: pictures in a measurement.
        search_steps: the student's steps in the search, whose choice then serves all; None searches at each.
    """

    calls: int = 24_000
    search_calls: int = 12_000
    images: int = 960
    search_steps: int | None = 4


@dataclass(frozen=True)
class Job:
    """One run: a cell of the benchmark, a choice of the search, and a seed."""

    stage: str  # search or final
    teacher: str
    guidance: str
    steps: int
    method: str
    seed: int
    calls: int
    images: int
    choice: Flags

    @property
    def flags(self) -> Flags:
        """Of `train_rdm_lora.py`, beyond those that all studies have."""
        states = dict(num_student_steps=self.steps, steps_per_rollout=min(4, self.steps))
        constant = {"score": TEACHERS[self.teacher].constant}
        guided = dict(guidance_scale=constant.get(self.guidance, scale_of(self.teacher, self.guidance)))
        return GUIDANCE[self.guidance].flags | guided | states | METHODS[self.method].flags | self.choice

    @property
    def key(self) -> str:
        """The name of its result, which has a digest of all that was asked for."""
        asked = json.dumps([asdict(self), COMMON | self.flags], sort_keys=True)
        digest = hashlib.sha256(asked.encode()).hexdigest()[:12]
        cell = (self.stage, self.teacher, self.guidance, str(self.steps), self.method, str(self.seed))
        return "/".join([*cell, digest])

    def command_line(self, folder: Path, **more: Any) -> list[str]:
        """The run's own, into a folder."""
        return command_line(self.teacher, self.seed, folder, **self.flags, **more)


def grid(method: str, teacher: str, guidance: str) -> list[Flags]:
    """The choices of the search, equally many for every method."""
    chosen, found = GUIDANCE[guidance], []
    for factor, second in product(RATES, METHODS[method].second):
        rate = factor * TEACHERS[teacher].learning_rate * chosen.rate
        ratio = second.get("fake_rate_ratio")
        quicker = {} if ratio is None else {"fake_learning_rate": rate * ratio * chosen.ratio}
        rest = {name: value for name, value in second.items() if name != "fake_rate_ratio"}
        found.append({"learning_rate": rate, **quicker, **rest})
    return found


def search_jobs(plan: Plan, teacher: str, guidance: str, steps: int, method: str) -> list[Job]:
    """The search that a cell's choice comes from."""
    at = (teacher, guidance, plan.search_steps or steps, method, SEARCH_SEED, plan.search_calls, plan.images)
    return [Job("search", *at, choice) for choice in grid(method, teacher, guidance)]


def best_choice(jobs: Iterable[Job], runs: Mapping[str, Mapping[str, Any]]) -> Flags | None:
    """The choice of the least distance among the runs of a search; None if some are missing."""
    jobs = list(jobs)
    if any(job.key not in runs for job in jobs):
        return None

    def distance(job: Job) -> float:
        run = runs[job.key]
        return run["final"]["fd_to_teacher"] if run["finite"] else float("inf")

    return min(jobs, key=distance).choice


def final_job(plan: Plan, teacher: str, guidance: str, steps: int, method: str, seed: int, choice: Flags) -> Job:
    """A run that is compared."""
    return Job("final", teacher, guidance, steps, method, seed, plan.calls, plan.images, choice)
