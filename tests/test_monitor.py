"""The health panel: its numbers against hand computations, and alarms that ring when and only when they should."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parts import make_estimate, make_run, run_arguments, train_run

import train_rdm_lora
from rdm_diffusers.distillation import GNDM, RunningMeans
from rdm_diffusers.training import monitor
from rdm_diffusers.training.checkpoint_files import find_checkpoint
from rdm_diffusers.training.checkpoints import load_checkpoint
from rdm_diffusers.training.monitor import CollapseError, Monitor, batch_health, fake_loss_health
from rdm_diffusers.training.tracking import numbers_of

UPDATES, TURN, SOON = 500, 150, 200
HEALTHY = {
    "distance": 0.2, "bias_share": 0.1, "fake_loss": 0.05, "contrast": 0.9, "log_ratio": -0.01,
    "reward/bold": 0.3, "reward_invalid/bold": 0.0, "reward_share_effective": 0.2, "student_grad_norm": 1.0,
}  # fmt: skip


def observe(series: Callable[[int], dict[str, float]], watching: Monitor | None = None) -> list[tuple[int, str]]:
    """The alarms of a run and when they rang; `series` says what of an update is not healthy."""
    watching = watching or Monitor(teacher_contrast=0.9)
    return [(u, said) for u in range(UPDATES) for said in watching.observe({**HEALTHY, **series(u)})]


def after_the_turn(**sick: float) -> Callable[[int], dict[str, float]]:
    """Healthy at first, then with these numbers for good."""
    return lambda update: sick if update >= TURN else {}


@pytest.mark.parametrize(
    ("sick", "saying", "flags"),
    [
        (
            {"bias_share": 0.8},
            "The fake score does not follow the student",
            ["--fake_updates_per_step", "--fake_learning_rate", "--learning_rate"],
        ),
        ({"contrast": 1.8}, "times the teacher's", ["--reward_share", "--guidance_scale", "--learning_rate"]),
        ({"contrast": 0.3}, "times the teacher's", ["--reward_share", "--guidance_scale", "--learning_rate"]),
        ({"distance": 0.5}, "The distance to the teacher is", ["--learning_rate"]),
        ({"fake_loss": 0.2}, "The fake score's loss is", ["--fake_learning_rate", "--learning_rate"]),
        ({"distance": 0.36, "reward/bold": 0.6}, "The reward bold rises", ["--reward_share", "--projection_guard"]),
        ({"reward_invalid/bold": 0.3}, "The reward bold is not finite", []),
        ({"reward_share_effective": 0.99}, "The rewards' part of a step is", ["--reward_share"]),
    ],
    ids=["fake_score_lags", "contrast_up", "contrast_down", "fidelity", "fake_loss", "hacking", "invalid", "share"],
)
def test_an_alarm_rings_once_after_the_run_turns_sick_and_names_its_flags(
    sick: dict, saying: str, flags: list[str]
) -> None:
    alarms = observe(after_the_turn(**sick))
    assert len(alarms) == 1
    update, said = alarms[0]
    assert TURN < update < TURN + SOON
    assert saying in said
    assert all(flag in said for flag in flags)
    assert said.endswith(".")
    assert ". " not in said  # one sentence


@pytest.mark.parametrize("batch", [4, 64])
def test_a_run_that_stays_as_it_is_rings_no_alarm_though_small_batches_scatter(batch: int) -> None:
    """Over random tau the distance of a single sample scatters by a factor of two, the fake score's loss by three."""
    generator, alarms = torch.Generator().manual_seed(0), []
    scatter = {"distance": 0.8, "fake_loss": 1.1, "reward/bold": 0.3, "contrast": 0.3, "bias_share": 1.0}
    for _ in range(3):
        watching = Monitor(teacher_contrast=0.9)
        noise = {
            name: ((width * torch.randn(2000, batch, generator=generator)).exp() / math.exp(width**2 / 2)).mean(1)
            for name, width in scatter.items()
        }
        numbers = {name: values.tolist() for name, values in noise.items()}
        series = ({n: HEALTHY[n] * v[u] for n, v in numbers.items()} for u in range(2000))
        alarms += [said for health in series for said in watching.observe({**HEALTHY, **health})]
    assert alarms == []


def test_a_run_that_gets_better_rings_no_alarm() -> None:
    better = lambda u: {"distance": 0.3 - u / 2500, "fake_loss": 0.08 - u / 9000, "reward/bold": 0.2 + u / 999}  # noqa: E731
    assert observe(better) == []


def test_no_alarm_rings_in_the_first_updates_however_wild_they_are() -> None:
    alarms = observe(lambda update: {"bias_share": 0.9, "contrast": 3.0})
    assert [update for update, _ in alarms] == [monitor.WARM_UP - 1] * 2


def test_a_passing_number_that_is_not_finite_is_no_alarm_and_is_not_remembered() -> None:
    watching = Monitor(teacher_contrast=0.9)
    spoilt = lambda u: dict.fromkeys(HEALTHY, float("nan") if u % 2 else float("inf")) if u in (250, 251) else {}  # noqa: E731
    assert observe(spoilt, watching) == []
    assert all(value == value and abs(value) < 1e9 for value in watching.state.values())


def test_a_reward_that_is_never_finite_rings_an_alarm() -> None:
    never = {"reward/bold": float("nan"), "reward_invalid/bold": 1.0}
    alarms = observe(lambda update: never)
    assert len(alarms) == 1
    assert "The reward bold is not finite for 100% of the samples" in alarms[0][1]


def test_without_a_measured_contrast_there_is_no_alarm_about_it() -> None:
    known = {name: value for name, value in HEALTHY.items() if name != "contrast"}
    unknown_teacher, unknown_student = Monitor(teacher_contrast=None), Monitor(teacher_contrast=0.9)
    for _ in range(UPDATES):
        assert unknown_teacher.observe({**HEALTHY, "contrast": 5.0}) == []
        assert unknown_student.observe(known) == []


def test_an_alarm_that_ended_may_ring_again() -> None:
    watching, sick = Monitor(teacher_contrast=0.9), lambda u: {"bias_share": 0.9} if u < 250 else {"bias_share": 0.0}
    assert [len(observe(sick, watching)) for _ in range(2)] == [1, 1]


def test_a_monitors_memory_is_json_and_continues_where_it_stopped() -> None:
    straight, broken = Monitor(0.9), Monitor(0.9)
    sick = after_the_turn(distance=0.7, **{"reward/bold": 0.1})
    expected = [straight.observe({**HEALTHY, **sick(u)}) for u in range(UPDATES)]
    found = [broken.observe({**HEALTHY, **sick(u)}) for u in range(TURN + 5)]
    resumed = Monitor(0.9, json.loads(json.dumps(broken.state)))
    found += [resumed.observe({**HEALTHY, **sick(u)}) for u in range(TURN + 5, UPDATES)]
    assert found == expected
    assert len([said for alarms in found for said in alarms]) == 1
    assert resumed.state == straight.state


def test_the_health_numbers_of_a_batch_are_what_they_say() -> None:
    x0, teacher, fake = (torch.randn(8, 4, 2, 2) for _ in range(3))
    e = make_estimate(x0, teacher, fake, step=torch.tensor([0] * 4 + [1] * 4))
    found = GNDM(group_size=4, gndm_lambda=0.5).advantage(e, RunningMeans())
    health = batch_health(e, found, 4)
    reward, distance = (teacher - fake).abs().mean(), (x0 - teacher).abs().mean()
    assert health["reward_over_distance"] == pytest.approx((reward / distance).item(), rel=1e-5)
    assert health["correction_over_reward"] == pytest.approx((found.correction.abs().mean() / reward).item())
    assert health["distance"] == pytest.approx(distance.item(), rel=1e-5)
    assert health["log_ratio"] == pytest.approx(((x0 - fake) ** 2 - (x0 - teacher) ** 2).mean().item(), rel=1e-4)
    assert {"bias_share", "bias_share/step_1", "bias_share/step_2"} <= health.keys()


@pytest.mark.parametrize(("bias", "share"), [(0.0, 0.0), (1.0, 0.5), (3.0, 0.9)])
def test_the_bias_share_is_unbiased(bias: float, share: float) -> None:
    x0 = torch.randn(40_000, 1, 1, 1)
    e = make_estimate(x0, x0, x0 + bias + torch.randn_like(x0))
    health = batch_health(e, GNDM(group_size=4, gndm_lambda=0.0).advantage(e, RunningMeans()), 4)
    assert health["bias_share"] == pytest.approx(share, abs=0.02)
    assert health["bias_share/step_1"] == health["bias_share"]


def test_the_fake_scores_loss_is_also_told_by_bins_of_time() -> None:
    health = fake_loss_health(torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0.0, 0.1, 0.6, 0.999]))
    assert numbers_of(health) == {"fake_loss": 3, "fake_loss/bin_1": 1.5, "fake_loss/bin_3": 3, "fake_loss/bin_4": 6}


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes the command line of a run of this test whose contrast rings an alarm at its second update."""
    monkeypatch.setattr(monitor, "WARM_UP", 2)
    monkeypatch.setattr(monitor, "CONTRAST_DRIFT", 1 + 1e-9)
    return lambda **changes: run_arguments(
        teacher_folder, prompts_file, tmp_path / "run", checkpointing_steps=1, monitor_images=1, **changes
    )


def test_an_alarm_of_a_run_is_printed_with_its_update_and_the_run_goes_on(argv, capsys) -> None:
    it = make_run(argv(max_train_steps=3))
    assert train_run(it) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("update 2: The student's contrast is") == 1
    assert it.state.update == 3


def test_stop_on_collapse_ends_the_run_and_leaves_the_checkpoints_before_the_alarm(argv, tmp_path: Path) -> None:
    it = make_run(argv(max_train_steps=5, stop_on_collapse=True))
    with pytest.raises(
        CollapseError, match=r"^Stopped after 2 updates \(--stop_on_collapse\)\. The student's contrast"
    ):
        train_run(it)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    resumed = make_run(argv(max_train_steps=5, resume_from_checkpoint="latest"))
    load_checkpoint(find_checkpoint(tmp_path / "run", "latest"), resumed.state)
    assert resumed.state.update == resumed.state.monitor.state["updates"] == 1


def test_the_script_of_a_run_that_collapses_exits_with_the_sentence_and_no_student(
    argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_rdm_lora.py", *argv(stop_on_collapse=True)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(train_rdm_lora.__file__, run_name="__main__")
    assert str(caught.value.code).startswith("error: Stopped after 2 updates (--stop_on_collapse). The student's")
    assert "\n" not in str(caught.value.code)
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()
