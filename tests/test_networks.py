"""Three roles on one base are three separate networks; guidance; precision; the cache of folded weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from parts import (
    TEXT_DIM,
    make_conditioning,
    make_run,
    make_shared,
    make_unet,
    randomise_adapters,
    relative_error,
    run_arguments,
)
from parts_float64 import ROUNDING
from peft import LoraConfig
from torch import Tensor, nn

from rdm_diffusers.families import Conditioning
from rdm_diffusers.families.sd_unet import StableDiffusionFamily
from rdm_diffusers.networks import ADAPTERS, FAKE_SCORE, ROLES, STUDENT, TEACHER, SeparateNetworks, SharedBase
from rdm_diffusers.prediction import NoiseSchedule, to_x0
from rdm_diffusers.training.checkpoints import load_checkpoint, save_checkpoint
from rdm_diffusers.training.validation import averaged_student, sample_student

T = torch.tensor([999, 700, 400, 20])


def noisy() -> Tensor:
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def prediction(networks: SharedBase | SeparateNetworks, role: str) -> Tensor:
    """The role's x0 of always the same samples."""
    return networks.predict(role, noisy(), T, make_conditioning(4))


def merged(networks: SharedBase, role: str) -> nn.Module:
    """A copy of the base alone, with the role's adapter merged into its weights."""
    denoiser = copy.deepcopy(networks.denoiser)
    if role != TEACHER:
        denoiser.fuse_lora(adapter_names=[ADAPTERS[role]])
    denoiser.unload_lora()
    return denoiser


def separate_copies(networks: SharedBase) -> SeparateNetworks:
    """The same three networks, each with weights of its own."""
    names = ("family", "schedule", "prediction_type", "null_conditioning", "guidance_scale")
    common = {name: getattr(networks, name) for name in names}
    return SeparateNetworks({role: merged(networks, role) for role in ROLES}, **common)


def train_a_little(networks: SharedBase, role: str, lr: float = 1e-2, steps: int = 2) -> None:
    """Moves a role's adapter."""
    optimizer = torch.optim.AdamW(networks.parameters(role), lr=lr)
    for _ in range(steps):
        x0 = networks.predict(role, noisy(), T, make_conditioning(4))
        networks.backward(role, x0, x0.detach() / x0.numel())
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("role", ROLES)
def test_acting_as_a_role_turns_autocast_on_for_trained_full_networks_alone(role: str) -> None:
    shared = make_shared()
    separate = separate_copies(shared)
    for networks in (shared, separate):
        with networks.acting_as(role):
            assert not torch.is_autocast_enabled("cpu")  # without a compute dtype
        networks.compute_dtype = torch.bfloat16
        with networks.acting_as(role):
            assert torch.is_autocast_enabled("cpu") is (networks is separate and role != TEACHER)
        assert not torch.is_autocast_enabled("cpu")


def test_networks_on_the_meta_device_are_made_and_called_as_any() -> None:
    with torch.device("meta"):
        student, teacher, base = (UNet2DConditionModel.from_config(make_unet().config) for _ in range(3))
    config = LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights="gaussian")
    common = dict(
        family=StableDiffusionFamily(), schedule=NoiseSchedule(None), prediction_type="flow_prediction",
        null_conditioning=make_conditioning(1), guidance_scale=1.0, compute_dtype=torch.bfloat16,
    )  # fmt: skip
    conditioning = Conditioning({"prompt_embeds": torch.empty(4, 5, TEXT_DIM, device="meta")})
    separate = SeparateNetworks({STUDENT: student, FAKE_SCORE: student, TEACHER: teacher}, **common)
    for networks in (separate, SharedBase(base, config, **common)):
        assert all(parameter.is_meta for parameter in networks.parameters(STUDENT))
        x0 = networks.predict(STUDENT, noisy().to("meta"), T.to("meta"), conditioning)
        networks.backward(STUDENT, x0, x0.detach())
        assert x0.is_meta and x0.shape == (4, 4, 8, 8)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.usefixtures("float64")
def test_a_shared_base_is_separate_copies(role: str, fold: bool) -> None:
    shared = make_shared(fold, guidance_scale=2.0)
    separate = separate_copies(shared)
    x0, gradient = {}, {}
    for networks in (shared, separate):
        x_t = noisy().requires_grad_()
        x0[networks] = networks.predict(role, x_t, T, make_conditioning(4))
        with networks.acting_as(role):
            gradient[networks] = torch.autograd.grad(x0[networks].sin().sum(), x_t)[0]
    assert relative_error(x0[shared].detach(), x0[separate].detach()) < ROUNDING
    assert relative_error(gradient[shared], gradient[separate]) < ROUNDING


def test_the_three_roles_are_three_different_networks() -> None:
    networks = make_shared()
    student, fake, teacher = (prediction(networks, role) for role in ROLES)
    for one, other in ((student, fake), (student, teacher), (fake, teacher)):
        assert relative_error(one, other) > 0.05


def test_a_role_has_no_parameters_of_another_and_the_teacher_has_none() -> None:
    networks = make_shared()
    student, fake = ({id(p) for p in networks.parameters(role)} for role in (STUDENT, FAKE_SCORE))
    assert len(student) == len(fake) > 0
    assert not student & fake
    assert networks.parameters(TEACHER) == []


@pytest.mark.usefixtures("float64")
def test_guidance_is_u_plus_w_times_c_minus_u_for_the_teacher_alone() -> None:
    networks, conditioning, x_t = make_shared(guidance_scale=3.0), make_conditioning(4), noisy()
    teacher = merged(networks, TEACHER)
    with torch.no_grad():
        c = teacher(x_t, T, conditioning.tensors["prompt_embeds"]).sample
        u = teacher(x_t, T, networks.null_conditioning.expand(4).tensors["prompt_embeds"]).sample
    expected = to_x0("epsilon", u + 3.0 * (c - u), x_t, *networks.schedule.scales(T, x_t))
    assert relative_error(prediction(networks, TEACHER), expected) < ROUNDING
    networks.guidance_scale = 1.0
    unguided = {role: prediction(networks, role) for role in (STUDENT, FAKE_SCORE)}
    networks.guidance_scale = 3.0
    assert all(torch.equal(prediction(networks, role), x0) for role, x0 in unguided.items())


@pytest.mark.parametrize(("guidance_scale", "samples"), [(1.0, [4]), (2.0, [8])])
def test_guidance_one_is_off_and_calls_the_network_once_on_the_batch(guidance_scale: float, samples: list) -> None:
    networks, called = make_shared(guidance_scale=guidance_scale), []
    networks.denoiser.register_forward_pre_hook(lambda module, args: called.append(len(args[0])))
    prediction(networks, TEACHER)
    assert called == samples


def test_calls_count_samples_by_role_and_a_guided_one_twice() -> None:
    networks = make_shared(guidance_scale=2.0)
    for role in ROLES:
        prediction(networks, role)
    train_a_little(networks, STUDENT, steps=3)
    assert networks.calls == {
        "student forward": 4 + 3 * 4, "student backward": 3 * 4, "fake_score forward": 4, "teacher forward": 2 * 4,
    }  # fmt: skip


OPTIONS = [{}, {"fold": True}, {"checkpointing": True}, {"dtype": torch.bfloat16}]


def with_steps(options: dict, fill: float = 0.0) -> SharedBase:
    """A fake score that knows the student's step, of four; `fill` scales the steps' random vectors."""
    networks = make_shared(**options)
    networks.add_step_embedding(networks.denoiser.get_submodule(networks.family.time_embedding_name), 4)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        networks.step_embedding += fill * torch.randn(networks.step_embedding.shape, generator=generator)
    return networks


def at_step(networks: SharedBase, role: str, step: int | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The role's x0 of always the same samples, which come from one step."""
    steps = None if step is None else torch.full((4,), step)
    return networks.predict(role, noisy(), T, make_conditioning(4, dtype=dtype), steps)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_fake_score_with_a_step_embedding_starts_as_one_without(options: dict) -> None:
    plain, networks, dtype = make_shared(**options), with_steps(options), options.get("dtype", torch.float32)
    with torch.no_grad():
        without = at_step(plain, FAKE_SCORE, None, dtype)
        assert all(torch.equal(at_step(networks, FAKE_SCORE, step, dtype), without) for step in (None, 0, 3))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_student_and_teacher_ignore_the_step_and_the_fake_score_does_not(options: dict) -> None:
    plain, networks, dtype = make_shared(**options), with_steps(options, fill=1.0), options.get("dtype", torch.float32)
    with torch.no_grad():
        fakes = [at_step(networks, FAKE_SCORE, step, dtype) for step in (0, 3)]
        for role in (STUDENT, TEACHER):
            assert torch.equal(at_step(networks, role, 3, dtype), at_step(plain, role, None, dtype))
        assert relative_error(fakes[0], fakes[1]) > 0.02
        # A sample's own step counts, whatever the others' are; without one nothing is added.
        mixed = networks.predict(FAKE_SCORE, noisy(), T, make_conditioning(4, dtype=dtype), torch.tensor([0, 3, 3, 0]))
        for i, step in enumerate((0, 3, 3, 0)):
            assert relative_error(mixed[i], fakes[step > 0][i]) < (1e-5 if dtype == torch.float32 else 1e-2)
        assert torch.equal(at_step(networks, FAKE_SCORE, None, dtype), at_step(plain, FAKE_SCORE, None, dtype))


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
@pytest.mark.usefixtures("float64")
def test_the_step_embeddings_gradient_is_exact_and_only_of_the_steps_that_were_with_steps(options: dict) -> None:
    networks, direction = with_steps(options, fill=0.1), torch.randn(4, 4, 8, 8)
    embedding = networks.step_embedding
    x0 = networks.predict(FAKE_SCORE, noisy(), T, make_conditioning(4), torch.tensor([1, 3, 3, 1]))
    at_step(networks, STUDENT, 2)  # the others are busy before the gradient is asked for
    at_step(networks, FAKE_SCORE, 0)
    networks.backward(FAKE_SCORE, x0, direction)
    assert not embedding.grad[[0, 2]].any()
    slope = embedding.grad.clone()

    def value(step: float) -> Tensor:
        with torch.no_grad():
            embedding.add_(step * slope)
            x0 = networks.predict(FAKE_SCORE, noisy(), T, make_conditioning(4), torch.tensor([1, 3, 3, 1]))
            embedding.sub_(step * slope)
        return (x0 * direction).double().sum()

    step = 1e-2 / slope.norm()
    assert (value(step) - value(-step)) / (2 * step) == pytest.approx(slope.square().sum().item(), rel=2e-2)
    assert slope.norm() > 1e-3


def test_the_step_embedding_is_the_fake_scores_parameter_alone_and_learns() -> None:
    networks = with_steps({})
    assert any(parameter is networks.step_embedding for parameter in networks.parameters(FAKE_SCORE))
    assert not any(parameter is networks.step_embedding for parameter in networks.parameters(STUDENT))
    assert not any(parameter is networks.step_embedding for parameter in networks.denoiser.parameters())
    optimizer = torch.optim.AdamW(networks.parameters(FAKE_SCORE), lr=1e-2)
    x0 = networks.predict(FAKE_SCORE, noisy(), T, make_conditioning(4), torch.tensor([0, 0, 1, 1]))
    networks.backward(FAKE_SCORE, x0, x0.detach())
    optimizer.step()
    assert networks.step_embedding[:2].abs().min() > 0
    assert not networks.step_embedding[2:].any()


@pytest.mark.parametrize("fold", [False, True])
def test_training_the_adapters_leaves_the_teacher_as_it_was(fold: bool) -> None:
    networks = make_shared(fold, guidance_scale=2.0)
    before = {role: prediction(networks, role) for role in ROLES}
    train_a_little(networks, STUDENT)
    train_a_little(networks, FAKE_SCORE)
    assert torch.equal(prediction(networks, TEACHER), before[TEACHER])
    assert relative_error(prediction(networks, STUDENT), before[STUDENT]) > 1e-3
    assert relative_error(prediction(networks, FAKE_SCORE), before[FAKE_SCORE]) > 1e-3


@pytest.mark.usefixtures("float64")
def test_folded_weights_follow_every_optimiser_step() -> None:
    layered, folded = make_shared(), make_shared(fold=True)
    for _ in range(3):
        for networks in (layered, folded):
            train_a_little(networks, STUDENT, steps=1)
        assert relative_error(prediction(folded, STUDENT), prediction(layered, STUDENT)) < ROUNDING


def test_folded_weights_follow_the_moving_average_and_a_loaded_checkpoint(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    it = make_run([*run_arguments(teacher_folder, prompts_file, tmp_path), "--fold_adapters"])
    conditioning = it.distillation.prompts.conditioning([0])

    @torch.no_grad()
    def predict() -> Tensor:
        return it.networks.predict(STUDENT, noisy(), T, conditioning)

    first = predict()
    checkpoint = save_checkpoint(tmp_path, it.state, it.arguments)
    randomise_adapters(it.networks)
    live = predict()
    with averaged_student(it.distillation, it.state):
        assert torch.equal(predict(), first)
    assert torch.equal(predict(), live)
    load_checkpoint(checkpoint, it.state)
    assert torch.equal(predict(), first)
    assert relative_error(live, first) > 1e-3


def test_adapters_are_float32_on_a_bfloat16_base_and_move_at_a_low_learning_rate() -> None:
    networks = make_shared(dtype=torch.bfloat16)
    parameters = networks.parameters(STUDENT)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    conditioning = make_conditioning(4, dtype=torch.bfloat16)
    x0 = networks.predict(STUDENT, noisy(), T, conditioning)
    networks.backward(STUDENT, x0, torch.ones_like(x0))
    touched = [parameter.grad != 0 for parameter in parameters]
    optimizer.step()
    moved = sum(int(((p != b) & t).sum()) for p, b, t in zip(parameters, before, touched, strict=True))
    assert x0.dtype == torch.float32
    assert next(networks.denoiser.conv_in.parameters()).dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    assert moved > 0.9 * sum(int(t.sum()) for t in touched) > 0


def test_a_validation_leaves_the_student_float32_and_bit_for_bit_as_it_was(
    teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    it = make_run(run_arguments(teacher_folder, prompts_file, tmp_path, mixed_precision="bf16"))
    randomise_adapters(it.networks)  # away from the average
    before = [parameter.detach().clone() for parameter in it.networks.parameters(STUDENT)]
    with averaged_student(it.distillation, it.state):
        images = sample_student(it.distillation, it.teacher, it.texts.shown_conditioning)
        assert any(not torch.equal(p, b) for p, b in zip(it.networks.parameters(STUDENT), before, strict=True))
    after = it.networks.parameters(STUDENT)
    assert images.shape == (2, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1
    assert all(p.dtype == torch.float32 and torch.equal(p, b) for p, b in zip(after, before, strict=True))
