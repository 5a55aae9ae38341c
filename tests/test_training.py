"""The loop: accumulation, optimiser counts, learning rates, the moving average, and what a validation may not do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parts import PROMPTS, make_run, read_state, relative_error, run_arguments, train_only, train_run
from safetensors.torch import load_file
from torch import Tensor

import train_rdm_lora
from rdm_diffusers.networks import FAKE_SCORE, STUDENT
from rdm_diffusers.training.batches import collect
from rdm_diffusers.training.launch import make_accelerator
from rdm_diffusers.training.loop import step
from rdm_diffusers.training.updates import fake_score_update, student_update
from rdm_diffusers.training.validation import averaged_student, sample_student

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes the command line of a run of this test."""
    return lambda **changes: run_arguments(
        teacher_folder, prompts_file, changes.pop("output_dir", tmp_path / "student"), **changes
    )


def weights(it, role: str) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in it.networks.parameters(role)]


def test_accumulation_over_one_two_and_four_batches_trains_the_same_student(argv, tmp_path: Path) -> None:
    exported, records = [], []
    for accumulation in (1, 2, 4):
        folder = tmp_path / str(accumulation)
        train_only(
            argv(
                output_dir=folder, train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
                fake_updates_per_step=3, checkpointing_steps=2, learning_rate=1e-3,
            )
        )  # fmt: skip
        exported.append(list(load_file(folder / LORA).values()))
        records.append(read_state(folder / "checkpoint-2"))
    assert relative_error(exported[1], exported[0]) < 1e-4
    assert relative_error(exported[2], exported[0]) < 1e-4
    for record in records:
        assert record["student/optimizer/0/step"] == 2
        assert record["fake_score/optimizer/0/step"] == 6


def test_both_roles_are_trained_and_the_base_is_not(argv) -> None:
    it = make_run(argv())
    before = {role: weights(it, role) for role in (STUDENT, FAKE_SCORE)}
    base = {name: p.clone() for name, p in it.networks.denoiser.named_parameters() if "lora_" not in name}
    assert train_run(it) == 0
    after = dict(it.networks.denoiser.named_parameters())
    assert it.state.update == 2
    assert all(relative_error(weights(it, role), before[role]) > 1e-3 for role in before)
    assert all(torch.equal(after[name], value) for name, value in base.items())


def test_a_run_that_does_not_reuse_rollouts_is_the_plain_loop(argv, tmp_path: Path) -> None:
    looped = make_run(argv(output_dir=tmp_path / "looped", fake_updates_per_step=2, reuse_rollouts=1))
    train_run(looped)
    plain = make_run(argv(output_dir=tmp_path / "plain"))
    for update in range(2):
        batch = collect(plain.distillation, update)
        student_update(plain.distillation, batch, plain.state.statistics)
        step(plain.state, STUDENT, plain.distillation.checks)
        for repeat in range(2):
            fake_score_update(plain.distillation, batch, repeat)
            step(plain.state, FAKE_SCORE, plain.distillation.checks)
        plain.state.update += 1
    for role in (STUDENT, FAKE_SCORE):
        assert all(torch.equal(a, b) for a, b in zip(weights(looped, role), weights(plain, role), strict=True))


def test_a_reused_rollout_is_made_once_for_all_the_updates_that_it_serves(argv) -> None:
    it = make_run(argv(reuse_rollouts=2, max_train_steps=4, checkpointing_steps=2, num_student_steps=4))
    depths = [it.distillation.depth(rollout) for rollout in range(2)]
    it.networks.calls.clear()
    train_run(it)
    samples, updates, fake_updates = 8, 4, it.config.method.fake_updates_per_step
    anew = samples * updates // 2  # at every second visit, the predictions at the stored states
    assert it.networks.calls == {
        "student forward": samples * (sum(depths) + updates) + anew,
        "student backward": samples * updates,
        "fake_score forward": samples * updates * (1 + fake_updates),
        "fake_score backward": samples * updates * fake_updates,
        "teacher forward": 2 * samples * updates,  # guided
    }


def test_a_fake_score_with_a_step_embedding_learns_it_and_the_students_file_does_not_hold_it(
    argv, tmp_path: Path
) -> None:
    train_rdm_lora.main(argv(checkpointing_steps=2, fake_score_steps=True))
    state = read_state(tmp_path / "student" / "checkpoint-2")
    sizes = {
        role: [value.numel() for name, value in state.items() if name.startswith(f"{role}/parameter/")]
        for role in (STUDENT, FAKE_SCORE)
    }
    embedding = state[f"fake_score/parameter/{len(sizes[STUDENT])}"]
    assert embedding.shape[0] == 2  # a vector for each of the student's steps, after the adapter
    assert embedding.abs().max(1).values.min() > 1e-3
    exported = [value.numel() for value in load_file(tmp_path / "student" / LORA).values()]
    assert sorted(exported) == sorted(sizes[STUDENT])
    assert sorted(sizes[FAKE_SCORE]) == sorted([*sizes[STUDENT], embedding.numel()])


def test_a_reward_is_higher_where_it_is_trained_for_than_where_it_is_punished(argv, tmp_path: Path) -> None:
    reached = {}
    for sign in (1, -1):
        reward = dict(algorithm="gndmr", reward=f"tiny_bold:{sign}", reward_share=0.9, guidance_scale=1.0)
        it = make_run(argv(output_dir=tmp_path / str(sign), max_train_steps=3, fake_updates_per_step=0, **reward))
        train_run(it)
        pictures = sample_student(it.distillation, it.teacher, it.distillation.prompts.once(range(len(PROMPTS))))
        reached[sign] = it.distillation.rewards.rewards[0](pictures, PROMPTS)
    assert (reached[1] > reached[-1]).all()


def test_the_two_roles_have_learning_rates_of_their_own_and_warm_up_by_updates(argv) -> None:
    it = make_run(
        argv(
            learning_rate=1e-3, fake_learning_rate=4e-3, lr_scheduler="constant_with_warmup", lr_warmup_steps=4,
            max_train_steps=3,
        )
    )  # fmt: skip
    train_run(it)
    rates = {role: it.state.optimizers[role].optimizer.param_groups[0]["lr"] for role in (STUDENT, FAKE_SCORE)}
    assert rates == {STUDENT: pytest.approx(1e-3 * 2 / 4), FAKE_SCORE: pytest.approx(4e-3 * 2 / 4)}


def test_a_cosine_schedule_ends_near_zero_at_the_last_update(argv) -> None:
    it = make_run(argv(learning_rate=1e-3, lr_scheduler="cosine", max_train_steps=4))
    role_optimizer, rates = it.state.optimizers[STUDENT], []
    for update in range(5):
        role_optimizer.set_update(update)
        rates.append(role_optimizer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 0.8536e-3, 0.5e-3, 0.1464e-3, 0.0], abs=1e-7)


def test_clipping_bounds_each_roles_gradient_by_itself(argv) -> None:
    it = make_run(argv(max_grad_norm=1e-3))
    for role in (STUDENT, FAKE_SCORE):
        for parameter in it.networks.parameters(role):
            parameter.grad = torch.ones_like(parameter)
    role_optimizer = it.state.optimizers[STUDENT]
    kept = {}
    role_optimizer.optimizer.register_step_pre_hook(
        lambda *_: kept.update(norm=torch.cat([p.grad.flatten() for p in role_optimizer.parameters]).norm())
    )
    before_clipping = role_optimizer.step()
    assert before_clipping == pytest.approx(sum(p.numel() for p in role_optimizer.parameters) ** 0.5, rel=1e-4)
    assert kept["norm"] == pytest.approx(1e-3, rel=1e-2)
    assert all((parameter.grad == 1).all() for parameter in it.networks.parameters(FAKE_SCORE))
    assert all(parameter.grad is None for parameter in role_optimizer.parameters)


@pytest.mark.parametrize("options", [[], ["--fold_adapters"]], ids=["layered", "folded"])
def test_validations_change_nothing_of_the_training(argv, tmp_path: Path, options: list[str]) -> None:
    trained = []
    for name, every in (("never", 1000), ("always", 1)):
        it = make_run([*argv(output_dir=tmp_path / name, max_train_steps=4, validation_steps=every), *options])

        def validate(update: int, it=it) -> None:
            with averaged_student(it.distillation, it.state):
                sample_student(it.distillation, it.teacher, it.texts.shown_conditioning)

        train_run(it, validate)
        trained.append(weights(it, STUDENT) + weights(it, FAKE_SCORE))
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


@pytest.mark.parametrize("use_ema", [True, False])
def test_the_moving_average_is_exported_where_there_is_one_else_the_weights(
    argv, tmp_path: Path, use_ema: bool
) -> None:
    every = argv(checkpointing_steps=2, ema_decay=0.5)
    train_rdm_lora.main(every if use_ema else [*every, "--no-use_ema"])
    exported = load_file(tmp_path / "student" / LORA).values()
    state = read_state(tmp_path / "student" / "checkpoint-2")
    live = [value for name, value in state.items() if name.startswith("student/parameter/")]
    average = [value for name, value in state.items() if name.startswith("ema/")]
    # The files order their tensors differently, so they are compared as sets.
    as_bytes = {tensor.numpy().tobytes() for tensor in exported}
    assert as_bytes == {tensor.numpy().tobytes() for tensor in (average if use_ema else live)}
    assert len(exported) == len(live)
    assert bool(average) is use_ema


def test_the_moving_average_follows_every_update(argv) -> None:
    it, lives = make_run(argv(max_train_steps=2, ema_decay=0.1, validation_steps=1)), []
    train_run(it, lambda update: lives.append(weights(it, STUDENT)))
    # diffusers' average starts at the first update's weights.
    pairs = zip(it.state.ema.shadow_params, *lives, strict=True)
    assert all(torch.allclose(average, 0.1 * one + 0.9 * two, atol=1e-6) for average, one, two in pairs)
    assert relative_error(lives[1], lives[0]) > 1e-3


def test_validation_pictures_are_written_and_logged_by_name(argv, tmp_path: Path) -> None:
    train_rdm_lora.main(argv(validation_steps=1, report_to="tensorboard"))
    pictures = sorted(path.name for path in (tmp_path / "student" / "validation").iterdir())
    assert pictures == ["step-1.png", "step-2.png"]
    assert list((tmp_path / "student" / "logs").rglob("events.out.tfevents.*"))


def test_a_launcher_that_promised_more_processes_than_there_are_is_told_so(argv, monkeypatch) -> None:
    it = make_run(argv())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"The launcher was asked for 2 processes and made 1, .*; launch with torchrun"
    ):
        make_accelerator(it.config.output, it.config.memory)


def test_speed_and_peak_memory_are_always_logged(argv, monkeypatch: pytest.MonkeyPatch) -> None:
    it, logged = make_run(argv(max_train_steps=20)), []
    monkeypatch.setattr(it.accelerator, "log", lambda numbers, step: logged.append((step, numbers)))
    train_run(it)
    assert [step for step, _ in logged] == [10, 20]
    for _, numbers in logged:
        assert numbers["images_per_second"] == pytest.approx(8 / numbers["seconds_per_update"])
        assert 0.1 < numbers["peak_memory_gib"] < 24  # of the whole process
