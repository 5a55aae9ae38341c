"""One short distillation in this process, stopped at a number of network calls and measured on the way."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, comb, lcm
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from runs import words_of
from torch import Tensor

from rdm_diffusers.config import RunConfig
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.config.pictures import needs_pictures
from rdm_diffusers.distillation import draw_samples
from rdm_diffusers.evaluation import load_prompt_set, solvers_of, teacher_sampler
from rdm_diffusers.families import Conditioning, Teacher, load_teacher
from rdm_diffusers.frechet import GaussianStatistics, frechet_distance
from rdm_diffusers.rewards import evaluate, load_reward
from rdm_diffusers.tiny.captions import parse_caption
from rdm_diffusers.tiny.classifier import load_classifier
from rdm_diffusers.tiny.reference import load_statistics
from rdm_diffusers.training.callbacks import Callback
from rdm_diffusers.training.finite import NonFiniteError
from rdm_diffusers.training.loop import train
from rdm_diffusers.training.monitor import CollapseError, Monitor
from rdm_diffusers.training.run import Distillation
from rdm_diffusers.training.trainer import Trainer
from rdm_diffusers.training.validation import averaged_student

REWARDS = ("tiny_prompt", "tiny_bold")
RATIOS = ("effective_sample_size", "clip_fraction", "drift")  # health numbers of importance weights
COMMON = dict(
    teacher_target="score", guidance_scale=1.0, train_batch_size=32, group_size=4, steps_per_rollout=4,
    learning_rate=1e-3, rank=16, lr_scheduler="constant", report_to="none", num_eval_images=0,
    checkpointing_steps=10**9, monitor_images=0,
)  # fmt: skip


@dataclass
class RecordingMonitor(Monitor):
    """Records the update of each alarm, and what importance ratios are like."""

    rung: list[tuple[int, str]] = field(default_factory=list)
    ratios: dict[int, dict[str, float]] = field(default_factory=dict)  # of each update that has them

    def observe(self, health: Mapping[str, float]) -> list[str]:
        """As `Monitor`'s."""
        fresh = super().observe(health)
        update = int(self.state["updates"])
        self.rung += [(update, text) for text in fresh]
        if RATIOS[0] in health:
            self.ratios[update] = {name: health[name] for name in RATIOS}
        return fresh

    def mean_ratios(self, reuse: int) -> dict[int, dict[str, float]]:
        """Means over rollouts by how many updates a rollout had served before, 1 to `reuse` - 1."""
        visits = {visit: [r for update, r in self.ratios.items() if (update - 1) % reuse == visit]
                  for visit in range(1, reuse)}  # fmt: skip
        return {
            visit: {name: mean(r[name] for r in found) for name in RATIOS} for visit, found in visits.items() if found
        }


def command_line(teacher: str, seed: int, folder: Path, **flags: Any) -> list[str]:
    """The flags of one run, as `train_rdm_lora.py` takes them."""
    words = ["--pretrained_model_name_or_path", teacher, "--seed", str(seed), "--output_dir", str(folder)]
    return words + words_of({**COMMON, **flags})


def calls_per_update(config: RunConfig) -> float:
    """The network calls of one update, on average over the random depths of rollouts."""
    method, samples = config.method, config.optimisation.train_batch_size
    guided = 1 if method.guidance_scale == 1 or config.target.teacher_target == "samples" else 2
    drawn = mean_depth(config) / method.steps_per_rollout  # calls for each sample that is trained on
    revisited = 1 if method.importance_weighting == "none" else drawn  # ratios need the whole rollout again
    rollout = (drawn + (method.reuse_rollouts - 1) * revisited) / method.reuse_rollouts
    return samples * (rollout + (guided + 1) * method.num_renoisings + 2 + 2 * method.fake_updates_per_step)


def mean_depth(config: RunConfig) -> float:
    """How many steps a rollout takes on average: up to the last state of any of its groups that is trained on."""
    steps, trained = config.method.num_student_steps, config.method.steps_per_rollout
    groups = config.optimisation.train_batch_size // (config.method.group_size * trained)
    return steps - sum((comb(k, trained) / comb(steps, trained)) ** groups for k in range(steps))


def calls_before(config: RunConfig) -> dict[str, int]:
    """The network calls of what a run prepares and shares with others: the teacher's images, and a learnt target."""
    target, guided, found = config.target, 1 if config.method.guidance_scale == 1 else 2, {}
    if needs_pictures(config):
        found["images"] = target.num_target_images * target.target_inference_steps * guided
    if target.teacher_target == "samples":
        found["target"] = target.target_train_steps * target.target_batch_size * 2
    return found


class CallBudget(Callback):
    """Measures a study's student at the first update that reaches each number of network calls; the last ends the run.

    Args:
        marks: network calls of all roles, ascending.
    """

    def __init__(self, marks: Sequence[int]) -> None:
        self.left = list(marks)

    def on_update(self, trainer: Trainer, health: Mapping[str, float]) -> None:
        calls = sum(trainer.networks.calls.values())
        if self.left and calls >= self.left[0]:
            self.left = [mark for mark in self.left if mark > calls]
            trainer.validate()
            if not self.left:
                trainer.stop()


class Study(Trainer):
    """A run that measures its student instead of drawing validation images.

    Args:
        config: the run's.
        num_images: pictures measured.
        references: further statistics, to which distances are measured, by name.
        callbacks: are called while it trains.

    Attributes:
        curve: an entry for each measurement.
    """

    def __init__(
        self,
        config: RunConfig,
        num_images: int,
        references: Mapping[str, GaussianStatistics] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        super().__init__(config, callbacks)
        self.num_images, self.references = num_images, references or {}
        self.curve: list[dict] = []
        self.began = 0.0  # processor time at the first update, put off by what measurements take

    def validate(self) -> None:
        networks, run, method = self.networks, self.distillation, self.config.method
        calls, update, seconds = dict(networks.calls), self.state.update, time.process_time() - self.began
        reference = "teacher_unguided" if method.guidance_scale == 1 else "teacher"
        with averaged_student(run, self.state):
            measured = measure(run, self.teacher, self.num_images, reference, self.references)
        networks.calls.clear()
        networks.calls.update(calls)
        self.curve.append({"updates": update, "network_calls": sum(calls.values()), "calls": calls,
                           "processor_seconds": seconds,
                           "rollouts": ceil(update / method.reuse_rollouts) * len(run.groups(0)) * method.group_size,
                           **measured})  # fmt: skip
        self.began = time.process_time() - seconds


def distil(
    teacher_name: str,
    seed: int,
    folder: Path,
    budget: int,
    marks: int,
    num_images: int,
    flags: dict[str, Any],
    references: Mapping[str, GaussianStatistics] | None = None,
) -> dict:
    """Trains until a budget of network calls is spent.

    Args:
        teacher_name: an embedded teacher's.
        seed: the run's.
        folder: scratch.
        budget: network calls, forwards and backwards of single samples.
        marks: how many times the student is measured, evenly.
        num_images: pictures measured; a multiple of 240 draws every caption equally often.
        flags: of `train_rdm_lora.py`, beyond `COMMON`.
        references: further statistics, to which distances are measured, by name.

    Returns:
        The arguments, the curve (one entry per mark), and the calls of every kind.
    """
    config = parse_args(command_line(teacher_name, seed, folder, **flags))
    unit = lcm(marks, config.method.reuse_rollouts)
    updates = max(1, round(budget / calls_per_update(config) / unit)) * unit
    config = config.changed("optimisation", max_train_steps=updates)
    config = config.changed("output", validation_steps=updates // marks, checkpointing_steps=updates * 10)
    return followed(Study(config, num_images, references))


def followed(study: Study) -> dict:
    """Loads and trains a study, and lets go of its folder.

    Returns:
        Its arguments, whether it stayed finite, its alarms, its seconds without loading, and its curve.

    Raises:
        KeyboardInterrupt: after a signal.
    """
    try:
        study.load()
        study.networks.calls.clear()  # those of a target, which runs share
        monitor = study.state.monitor = RecordingMonitor(study.state.monitor.teacher_contrast)
        started, finite, study.began = time.time(), True, time.process_time()
        try:
            if train(study):
                raise KeyboardInterrupt
        except (NonFiniteError, CollapseError) as error:  # a diverged run is also a result
            finite = False
            print(f"{study.folder}: {error}")
    finally:
        study.close()
    settings = {name: value for name, value in study.config.as_arguments().items() if name != "output_dir"}
    return {
        "arguments": settings, "finite": finite, "alarms": monitor.rung,
        "seconds": time.time() - started, "ratios": monitor.mean_ratios(study.config.method.reuse_rollouts),
        "curve": study.curve,
    }  # fmt: skip


@torch.no_grad()
def measure(
    run: Distillation,
    teacher: Teacher,
    num_images: int,
    reference: str,
    references: Mapping[str, GaussianStatistics],
) -> dict:
    """Distances, accuracy and rewards of the student's pictures, the same noises for every run."""
    images = torch.cat([draw(run, teacher, start) for start in range(0, num_images, 240)])
    found = GaussianStatistics.of(load_classifier().features(images))
    others = {name: frechet_distance(found, statistics) for name, statistics in references.items()}
    return {**measure_images(images, teacher.name, reference), **others}


@torch.no_grad()
def measure_teacher(name: str, num_images: int, guidance_scale: float = 1.0) -> dict:
    """The same for the teacher, with other seeds than its reference's."""
    images = teacher_images(name, num_images, guidance_scale, 2_000_000)
    return measure_images(images, name, "teacher_unguided" if guidance_scale == 1 else "teacher")


def teacher_images(name: str, num_images: int, guidance_scale: float, first_seed: int, steps: int = 50) -> Tensor:
    """A teacher's images of all captions in turn, by its usual solver."""
    teacher = load_teacher(name, torch.float32)
    solver = next(iter(solvers_of(teacher.pipeline)))
    sampler = teacher_sampler(teacher.pipeline, solver, steps, guidance_scale, 240, **teacher.call_options)
    return sampler(captions_of(name, 0, num_images), range(first_seed, first_seed + num_images))[0]


def measure_images(images: Tensor, teacher: str, reference: str) -> dict:
    """Distances, accuracy and rewards of pictures of all captions in turn."""
    prompts = captions_of(teacher, 0, len(images))
    classifier, statistics = load_classifier(), load_statistics(teacher)
    found = GaussianStatistics.of(classifier.features(images))
    rewards = {name: evaluate(load_reward(name, "cpu").reward, images, prompts).mean().item() for name in REWARDS}
    return {
        "fd_to_teacher": frechet_distance(found, statistics[reference]),
        "fd_to_data": frechet_distance(found, statistics["data"]),
        "prompt_accuracy": classifier.correct(images, [parse_caption(p) for p in prompts])["all"].float().mean().item(),
        **rewards,
    }


def draw(run: Distillation, teacher: Teacher, start: int) -> Tensor:
    """The student's images of 240 prompts, from noises that depend on `start` only."""
    generator = torch.Generator().manual_seed(1_000_000 + start)
    noise = (torch.randn(240, *run.latent_shape, generator=generator) for _ in range(run.num_steps))
    latents = draw_samples(
        run.student, run.scheduler, noise, encoded(teacher.name, tuple(captions_of(teacher.name, start, 240)))
    )
    return teacher.family.decode(teacher.pipeline, latents)


def captions_of(name: str, start: int, count: int) -> list[str]:
    """The captions of an embedded teacher from number `start` on; after the last the first one follows."""
    captions = load_prompt_set(name)
    return [captions[i % len(captions)] for i in range(start, start + count)]


@lru_cache(maxsize=16)
def encoded(name: str, captions: tuple[str, ...]) -> Conditioning:
    """Captions, encoded by an embedded teacher; a run's own drops its text encoders."""
    return load_teacher(name, torch.float32).encode_prompts(list(captions))
