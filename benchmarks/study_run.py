"""One short distillation in this process, stopped at a number of network calls and measured on the way."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdm_diffusers.distillation import draw_samples
from rdm_diffusers.evaluation import evaluation_prompts, teacher_sampler
from rdm_diffusers.evaluation.samplers import solvers_of
from rdm_diffusers.families import Teacher, load_teacher
from rdm_diffusers.frechet import GaussianStatistics, frechet_distance
from rdm_diffusers.rewards import evaluate, load_reward
from rdm_diffusers.tiny.captions import CAPTIONS, parse_caption
from rdm_diffusers.tiny.classifier import load_classifier
from rdm_diffusers.tiny.reference import load_statistics
from rdm_diffusers.training.arguments import parse_args
from rdm_diffusers.training.checkpoints import TrainState
from rdm_diffusers.training.checks import prepare_output
from rdm_diffusers.training.external_rewards import load_rewards
from rdm_diffusers.training.launch import make_accelerator
from rdm_diffusers.training.loop import train
from rdm_diffusers.training.monitor import Monitor
from rdm_diffusers.training.prompts import read_texts
from rdm_diffusers.training.setup import load, make_distillation, make_lora_networks, make_state, teacher_contrast
from rdm_diffusers.training.updates import Distillation
from rdm_diffusers.training.validation import averaged_student

REWARDS = ("tiny_prompt", "tiny_bold")
COMMON = dict(
    guidance_scale=1.0, train_batch_size=32, group_size=4, steps_per_rollout=4, learning_rate=1e-3, rank=16,
    lr_scheduler="constant", report_to="none", num_eval_images=0, checkpointing_steps=10**9, monitor_images=0,
)  # fmt: skip


@dataclass
class RecordingMonitor(Monitor):
    """Remembers at which update each alarm rang."""

    rung: list[tuple[int, str]] = field(default_factory=list)

    def observe(self, health: Mapping[str, float]) -> list[str]:
        """As `Monitor`'s."""
        fresh = super().observe(health)
        self.rung += [(int(self.state["updates"]), text) for text in fresh]
        return fresh


def command_line(teacher: str, seed: int, folder: Path, **flags: Any) -> list[str]:
    """The flags of one run, as `train_rdm_lora.py` takes them."""
    words = ["--pretrained_model_name_or_path", teacher, "--seed", str(seed), "--output_dir", str(folder)]
    for name, value in {**COMMON, **flags}.items():
        if value is True or value is False:
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [f"--{name}", str(one)]
    return words


def calls_per_update(args) -> int:
    """Forwards and backwards of single samples, every network's, that one update costs."""
    guided = 1 if args.guidance_scale == 1 else 2
    estimate = (guided + 1) * args.num_renoisings
    return args.train_batch_size * (1 + estimate + 2 + 2 * args.fake_updates_per_step)


def distil(
    teacher_name: str, seed: int, folder: Path, budget: int, marks: int, num_images: int, flags: dict[str, Any]
) -> dict:
    """Trains until the network calls are spent.

    Args:
        teacher_name: an embedded teacher's.
        seed: the run's.
        folder: scratch.
        budget: network calls, forwards and backwards of single samples.
        marks: how many times the student is measured, evenly.
        num_images: pictures measured; a multiple of 240 draws every caption equally often.
        flags: of `train_rdm_lora.py`, beyond `COMMON`.

    Returns:
        The arguments, the curve (one entry per mark), and the calls of every kind.
    """
    args = parse_args(command_line(teacher_name, seed, folder, **flags))
    unit = marks * args.reuse_rollouts
    args.max_train_steps = max(1, round(budget / calls_per_update(args) / unit)) * unit
    args.validation_steps, args.checkpointing_steps = args.max_train_steps // marks, args.max_train_steps * 10
    prepare_output(args)
    accelerator = make_accelerator(args)
    rewards = load_rewards(args, accelerator.device)
    teacher = load(args, accelerator.device)
    texts = read_texts(teacher, list(CAPTIONS), args, accelerator)
    networks = make_lora_networks(teacher, texts, args, accelerator)
    run = make_distillation(teacher, networks, texts, rewards, args, accelerator)
    state = make_state(networks, accelerator, args)
    state.monitor = RecordingMonitor(teacher_contrast(run, teacher, args.monitor_images))
    curve: list[dict] = []
    started = time.time()

    def validate(update: int) -> None:
        calls = dict(networks.calls)
        with averaged_student(run, state):
            measured = measure(
                run, state, teacher, num_images, "teacher_unguided" if args.guidance_scale == 1 else "teacher"
            )
        networks.calls.clear()
        networks.calls.update(calls)
        curve.append({"updates": update, "network_calls": sum(calls.values()), "calls": calls,
                      "rollouts": update // args.reuse_rollouts * len(run.groups(0)) * args.group_size,
                      **measured})  # fmt: skip

    finite = True
    try:
        if train(run, state, args, accelerator, validate):
            raise KeyboardInterrupt
    except RuntimeError as error:  # a diverged run is a result, too
        finite = False
        print(f"{teacher_name} {seed} {flags}: {error}")
    settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
    return {
        "arguments": settings, "finite": finite, "alarms": state.monitor.rung,
        "seconds": time.time() - started, "curve": curve,
    }  # fmt: skip


@torch.no_grad()
def measure(run: Distillation, state: TrainState, teacher: Teacher, num_images: int, reference: str) -> dict:
    """Distances, accuracy and rewards of the student's pictures, the same noises for every run."""
    images = torch.cat([draw(run, teacher, start) for start in range(0, num_images, 240)])
    return measure_images(images, teacher.name, reference)


@torch.no_grad()
def measure_teacher(name: str, num_images: int) -> dict:
    """The same of the unguided teacher's pictures, of other seeds than the reference's."""
    teacher = load_teacher(name, torch.float32)
    many = next(iter(solvers_of(teacher.pipeline)))
    sampler = teacher_sampler(teacher.pipeline, many, 50, 1.0, 240, **teacher.call_options)
    images, _ = sampler(evaluation_prompts(num_images), range(2_000_000, 2_000_000 + num_images))
    return measure_images(images, name, "teacher_unguided")


def measure_images(images: Tensor, teacher: str, reference: str) -> dict:
    """Distances, accuracy and rewards of pictures of all captions in turn."""
    prompts = evaluation_prompts(len(images))
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
    """The student's pictures of 240 prompts from noises that only `start` decides."""
    generator = torch.Generator().manual_seed(1_000_000 + start)
    noise = (torch.randn(240, *run.latent_shape, generator=generator) for _ in range(run.num_steps))
    latents = draw_samples(run.student, run.scheduler, noise, every_caption(teacher))
    return teacher.family.decode(teacher.pipeline, latents)


@lru_cache(maxsize=1)
def every_caption(teacher: Teacher):
    """The conditioning of all 240 captions, in order."""
    return teacher.encode_prompts(list(CAPTIONS))
