"""The rewards' strength over a run: 0 is a run without rewards, 1 the constant, and a resumed run goes on exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parts import make_run, read_state, run_arguments, train_only
from torch import Tensor

from rdm_diffusers import RunConfig, Trainer
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.networks import FAKE_SCORE, STUDENT
from rdm_diffusers.training.batches import collect, weigh_samples
from rdm_diffusers.training.reward_schedule import reward_schedule
from rdm_diffusers.training.updates import fake_score_update, student_update

REWARDS = ["tiny_bold", "tiny_prompt_black_box"]  # one joins R_dm's direction, one tilts the target
WARM_UP = 4


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    def make(folder: str = "student", **changes) -> list[str]:
        options = dict(algorithm="gndmr", reward=REWARDS, reward_tilt=1.0, checkpointing_steps=1)
        return run_arguments(teacher_folder, prompts_file, tmp_path / folder, **{**options, **changes})

    return make


def strengths(updates: int, **changes) -> list[float]:
    """The strength at every update of a run."""
    schedule = reward_schedule(RunConfig.of(algorithm="gndmr", max_train_steps=updates, **changes))
    return [schedule(update) for update in range(updates + 1)]


def test_the_strength_rises_evenly_and_stays_or_falls_to_0_at_the_end() -> None:
    assert strengths(3) == [1, 1, 1, 1]
    assert strengths(6, reward_warmup_steps=4) == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert strengths(6, reward_scheduler="linear", reward_warmup_steps=2) == [0, 0.5, 1, 0.75, 0.5, 0.25, 0]
    cosine = strengths(6, reward_scheduler="cosine", reward_warmup_steps=2)
    assert cosine == pytest.approx([0, 0.5, 1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0])


@pytest.mark.parametrize("combination", ["share", "sum"])
def test_a_strength_of_0_is_a_run_without_rewards_bit_for_bit(argv, tmp_path: Path, combination: str) -> None:
    train_only(argv("rewards", max_train_steps=1, reward_warmup_steps=9, reward_combination=combination))
    train_only(argv("plain", max_train_steps=1, algorithm="gndm", reward=None))
    rewarded, plain = (read_state(tmp_path / name / "checkpoint-1") for name in ("rewards", "plain"))
    trained = [name for name in plain if not name.startswith("statistics/")]
    assert len(trained) > 10 and all(torch.equal(rewarded[name], plain[name]) for name in trained)
    assert {name for name in rewarded if name.startswith("statistics/variance/")}  # the reward was looked at


def gradients(argv: list[str], update: int) -> tuple[list[Tensor], float]:
    """The gradients of both roles in a run's first rollout, if it were for this update, and the rewards' strength."""
    it = make_run(argv)
    statistics = it.state.statistics
    batch, health = weigh_samples(it.distillation, collect(it.distillation, 0), statistics, update)
    student_update(it.distillation, batch, statistics)
    fake_score_update(it.distillation, batch, 0)
    parameters = (p for role in (STUDENT, FAKE_SCORE) for p in it.networks.parameters(role))
    return [p.grad for p in parameters if p.grad is not None], float(health["reward_strength"])


def test_after_the_warm_up_updates_are_those_of_constant_rewards_and_before_they_are_not(argv) -> None:
    constant, _ = gradients(argv(), 7)
    after, full = gradients(argv(reward_warmup_steps=WARM_UP), WARM_UP)
    before, half = gradients(argv(reward_warmup_steps=WARM_UP), WARM_UP // 2)
    assert (full, half) == (1, 0.5)
    assert all(torch.equal(one, other) for one, other in zip(constant, after, strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(constant, before, strict=True))


@pytest.mark.parametrize("reuse", [1, 2])
def test_a_run_that_resumes_in_its_warm_up_goes_on_exactly(argv, tmp_path: Path, reuse: int) -> None:
    options = dict(max_train_steps=6, reward_warmup_steps=5, reuse_rollouts=reuse, checkpointing_steps=2)
    train_only(argv("whole", **options))
    with Trainer(parse_args(argv("parts", **{**options, "max_train_steps": 2}))) as trainer:
        trainer.train()
    train_only(argv("parts", **options, resume_from_checkpoint="latest"))
    whole, parts = (read_state(tmp_path / name / "checkpoint-6") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_resumed_run_keeps_its_schedule_and_the_end_that_it_falls_to(argv) -> None:
    with Trainer(parse_args(argv(max_train_steps=1, reward_scheduler="linear"))) as trainer:
        trainer.train()
    for changes in (
        dict(max_train_steps=3, reward_scheduler="linear"),
        dict(max_train_steps=1, reward_scheduler="cosine"),
        dict(max_train_steps=1, reward_scheduler="linear", reward_warmup_steps=1),
    ):
        named = {"linear": "max_train_steps", "cosine": "reward_scheduler"}[changes["reward_scheduler"]]
        named = "reward_warmup_steps" if "reward_warmup_steps" in changes else named
        with pytest.raises(ValueError, match=rf"made with other arguments: --{named} \(was "):
            Trainer(parse_args(argv(**changes, resume_from_checkpoint="latest"))).check()


@pytest.mark.parametrize(("name", "value"), [("reward_warmup_steps", 5), ("reward_scheduler", "cosine")])
def test_a_schedule_without_rewards_is_refused(name: str, value) -> None:
    with pytest.raises(ValueError, match=f"--{name} would have no effect without rewards; leave it out, or use "):
        RunConfig.of(**{name: value})
