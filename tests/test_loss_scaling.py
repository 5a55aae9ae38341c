"""In fp16 gradients are scaled: they do not vanish, an overflow is no failure, and a resumed run is the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from parts import change, make_conditioning, make_run, make_shared, read_state, relative_error, run_arguments, train_run
from test_resume import assert_resuming_changes_nothing
from torch import Tensor

from rdm_diffusers.distillation.reward_gradients import differentiable_gradients
from rdm_diffusers.networks import FAKE_SCORE, STUDENT
from rdm_diffusers.training.batches import collect
from rdm_diffusers.training.checkpoints import load_checkpoint, save_checkpoint
from rdm_diffusers.training.devices import prepare_vae
from rdm_diffusers.training.finite import NonFiniteError
from rdm_diffusers.training.loop import step
from rdm_diffusers.training.loss_scaling import LossScaler, scaled
from rdm_diffusers.training.updates import fake_score_update, student_update


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """The command line of a run in fp16 with some flags changed."""
    return lambda name="student", **changes: run_arguments(
        teacher_folder, prompts_file, tmp_path / name, **{"mixed_precision": "fp16", **changes}
    )


def set_scale(scaler: LossScaler, scale: float) -> None:
    scaler.load_state_dict(scaler.state_dict() | {"scale": scale})


def gradient(dtype: torch.dtype, scaler: LossScaler | None, size: float) -> list[Tensor]:
    """The student's gradient of a direction of a size, unscaled."""
    networks = make_shared(dtype=dtype)
    x_t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x0 = networks.predict(STUDENT, x_t, torch.tensor([20, 300, 600, 990]), make_conditioning(4, dtype=dtype))
    direction = size * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    networks.backward(STUDENT, x0, scaled(direction, scaler))
    scale = 1 if scaler is None else scaler.get_scale()
    return [parameter.grad / scale for parameter in networks.parameters(STUDENT)]


def test_gradients_too_small_for_float16_survive_by_their_scale() -> None:
    small = 1e-7
    exact = gradient(torch.float32, None, small)
    assert relative_error(gradient(torch.float16, LossScaler(torch.device("cpu")), small), exact) < 0.02
    assert relative_error(gradient(torch.float16, None, small), exact) > 0.2


@pytest.mark.parametrize("student", ["lora", "full"])
def test_a_run_in_fp16_follows_the_run_in_float32(argv, student: str) -> None:
    moved = []
    for precision in ("fp16", "no"):
        words = argv(mixed_precision=precision, max_train_steps=1, **({} if student == "lora" else {"rank": None}))
        it = make_run(words, student)
        before = [parameter.detach().clone() for parameter in it.networks.parameters(STUDENT)]
        norms = []
        it.state.optimizers[STUDENT].optimizer.register_step_pre_hook(
            lambda optimizer, *_, norms=norms: norms.extend(p.grad.norm() for p in optimizer.param_groups[0]["params"])
        )
        train_run(it)
        after = it.networks.parameters(STUDENT)
        assert all(parameter.dtype == torch.float32 for parameter in after)
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        moved.append(torch.stack(norms))
    assert relative_error(moved[0], moved[1]) < 0.05


def test_an_overflow_moves_neither_weights_nor_average_and_halves_the_scale(argv) -> None:
    it = make_run(argv())
    for role in (STUDENT, FAKE_SCORE):
        batch, role_optimizer = collect(it.distillation, 0), it.state.optimizers[role]
        set_scale(role_optimizer.scaler, 2.0**8)
        before = [parameter.detach().clone() for parameter in role_optimizer.parameters]
        for overflows in (True, False):
            if role == STUDENT:
                student_update(it.distillation, batch, it.state.statistics)
            else:
                fake_score_update(it.distillation, batch, 0)
            scale = role_optimizer.scaler.get_scale()
            if overflows:
                role_optimizer.parameters[-1].grad.fill_(torch.inf)
            norm = step(it.state, role, it.distillation.checks)
            same = all(torch.equal(a, b) for a, b in zip(before, role_optimizer.parameters, strict=True))
            assert (bool(norm.isfinite()), same) == (not overflows, overflows)
            assert role_optimizer.scaler.get_scale() == (scale / 2 if overflows else scale)
            assert role_optimizer.scaler.overflows == 1
            if role == STUDENT:
                assert it.state.ema.optimization_step == (0 if overflows else 1)


def test_the_scale_changes_no_update_and_clipping_sees_unscaled_gradients(argv) -> None:
    reached = []
    for scale in (2.0**8, 2.0**11):
        it = make_run(argv(max_grad_norm=1e-3))
        set_scale(it.state.optimizers[STUDENT].scaler, scale)
        student_update(it.distillation, collect(it.distillation, 0), it.state.statistics)
        norm = step(it.state, STUDENT, it.distillation.checks)
        reached.append([norm, *(parameter.detach() for parameter in it.networks.parameters(STUDENT))])
    assert relative_error(reached[0], reached[1]) < torch.finfo(torch.float16).eps


def test_a_gradient_that_is_not_finite_without_a_scale_is_a_failure(argv) -> None:
    it = make_run(argv())
    set_scale(it.state.optimizers[STUDENT].scaler, 1.0)
    student_update(it.distillation, collect(it.distillation, 0), it.state.statistics)
    it.networks.parameters(STUDENT)[0].grad.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"The gradient is not finite.*--mixed_precision bf16 or no will do"):
        step(it.state, STUDENT, it.distillation.checks)


def test_a_term_that_is_not_finite_is_no_overflow(argv) -> None:
    it = make_run(argv())
    batch = collect(it.distillation, 0)
    batch.samples.x0[5] = torch.nan
    fake_score_update(it.distillation, batch, 0)
    with pytest.raises(NonFiniteError, match="The fake score loss is not finite for prompt"):
        step(it.state, FAKE_SCORE, it.distillation.checks)


def test_resuming_changes_nothing_with_a_scale_that_overflows(
    argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = LossScaler.__init__

    def large(self: LossScaler, device: torch.device) -> None:
        usual(self, device)
        self._init_scale = 2.0**24

    monkeypatch.setattr(LossScaler, "__init__", large)
    assert_resuming_changes_nothing(argv, tmp_path, [], logging_steps=1)
    it = make_run(argv("again"))
    load_checkpoint(tmp_path / "straight" / "checkpoint-3", it.state)
    scalers = [it.state.optimizers[role].scaler for role in (STUDENT, FAKE_SCORE)]
    assert all(scaler.overflows > 0 and scaler.get_scale() == 2.0**24 / 2**scaler.overflows for scaler in scalers)


def test_a_scaler_whose_numbers_a_checkpoint_lacks_is_refused(argv, tmp_path: Path) -> None:
    plain = make_run(argv(mixed_precision="no"))
    path = save_checkpoint(tmp_path / "run", plain.state, plain.arguments)
    assert read_state(path)
    with pytest.raises(ValueError, match="does not fit this run"):
        load_checkpoint(path, make_run(argv("other")).state)


def test_scale_and_overflows_are_logged(argv) -> None:
    it, logged = make_run(argv(logging_steps=1)), {}
    it.accelerator.log = lambda numbers, step: logged.update(numbers)
    change(it, "optimisation", max_train_steps=1)
    train_run(it)
    scalers = {role: it.state.optimizers[role].scaler for role in (STUDENT, FAKE_SCORE)}
    assert logged["overflows"] == sum(scaler.overflows for scaler in scalers.values())
    assert all(logged[f"loss_scale/{role}"] == scaler.get_scale() for role, scaler in scalers.items())


class Faint:
    """A reward whose gradients are below float16's smallest number."""

    name, differentiable = "faint", True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 1e-9 * images.square().sum((1, 2, 3))


def test_a_rewards_gradient_is_not_lost_in_a_decoder_in_float16() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 4, 1, 1)
    found = []
    for dtype in (torch.float32, torch.float16):

        def decode(latents: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return torch.nn.functional.conv2d(latents.to(dtype), weight.to(dtype)).float().sigmoid()

        x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        found.append(differentiable_gradients([Faint()], decode, x0, ["a", "b"], 2)[0].gradient)
    assert relative_error(found[1], found[0]) < 0.01


def test_an_autoencoder_that_leaves_float16s_range_stays_float32(argv) -> None:
    it = make_run(argv())
    vae = it.teacher.pipeline.vae
    assert vae.config.force_upcast and vae.dtype == torch.float32
    assert it.teacher.denoiser.dtype == torch.float16
    vae.register_to_config(force_upcast=False)
    prepare_vae(vae.half(), it.config.memory)
    assert vae.dtype == torch.float16
