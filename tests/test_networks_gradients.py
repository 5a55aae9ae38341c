"""The shared base's silent traps exist, and `Networks.backward` is exact all the same."""

from __future__ import annotations

import pytest
import torch
from parts import make_conditioning, make_shared, relative_error
from parts_float64 import ROUNDING
from torch import Tensor

from rdm_diffusers.networks import ADAPTERS, FAKE_SCORE, ROLES, STUDENT, SharedBase

TRAINED = (STUDENT, FAKE_SCORE)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, its times, a conditioning and a direction, always the same."""
    generator = torch.Generator().manual_seed(4)
    x_t, direction = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    return x_t, torch.tensor([999, 700, 400, 20]), make_conditioning(4), direction


def reference_gradients(role: str) -> list[Tensor]:
    """What autograd gives with no other role about: no checkpointing, no folding, no switching."""
    networks, (x_t, t, conditioning, direction) = make_shared(), inputs()
    with networks.acting_as(role):
        x0 = networks.predict(role, x_t, t, conditioning)
        return list(torch.autograd.grad((x0 * direction).sum(), networks.parameters(role)))


def gradients(networks: SharedBase, role: str) -> list[Tensor]:
    """What `backward` accumulated."""
    return [parameter.grad for parameter in networks.parameters(role)]


def predict_and_forget(networks: SharedBase, role: str) -> tuple[Tensor, Tensor]:
    """The role's prediction, after which the other roles were busy; and the direction for it."""
    x_t, t, conditioning, direction = inputs()
    x0 = networks.predict(role, x_t, t, conditioning)
    for other in ROLES:
        networks.predict(other, x_t, t, conditioning)
    return x0, direction


def test_switching_adapters_before_backward_gives_no_gradient_and_no_error() -> None:
    networks, (x_t, t, conditioning, direction) = make_shared(), inputs()
    networks.denoiser.enable_adapters()
    networks.denoiser.set_adapter(ADAPTERS[STUDENT])  # peft's own switch, which flips requires_grad
    output = networks.family.denoise(networks.denoiser, x_t, t, conditioning)
    networks.denoiser.set_adapter(ADAPTERS[FAKE_SCORE])
    output.backward(direction)
    assert all(gradient is None for gradient in gradients(networks, STUDENT))


def test_with_checkpointing_the_wrong_adapter_in_backward_gives_silently_wrong_gradients() -> None:
    networks = make_shared(checkpointing=True)
    x0, direction = predict_and_forget(networks, STUDENT)
    with networks.acting_as(FAKE_SCORE):
        x0.backward(direction)
    assert relative_error(gradients(networks, STUDENT), reference_gradients(STUDENT)) > 0.1


@pytest.mark.parametrize("role", TRAINED)
@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"fold": True}])
@pytest.mark.usefixtures("float64")
def test_backward_is_exact_whatever_the_other_roles_did_in_between(role: str, options: dict) -> None:
    networks = make_shared(**options)
    x0, direction = predict_and_forget(networks, role)
    with networks.acting_as(FAKE_SCORE if role == STUDENT else STUDENT):
        networks.backward(role, x0, direction)
    assert relative_error(gradients(networks, role), reference_gradients(role)) < ROUNDING


@pytest.mark.parametrize("role", TRAINED)
def test_backward_touches_only_the_roles_own_parameters(role: str) -> None:
    networks = make_shared()
    networks.backward(role, *predict_and_forget(networks, role))
    own = {id(parameter) for parameter in networks.parameters(role)}
    others = [p for p in networks.denoiser.parameters() if id(p) not in own]
    assert len(others) > len(own)
    assert all(parameter.grad is None for parameter in others)
    assert all(gradient.abs().max() > 0 for gradient in gradients(networks, role))


@pytest.mark.usefixtures("float64")
def test_gradient_checkpointing_on_is_off() -> None:
    plain, checkpointed = make_shared(), make_shared(checkpointing=True)
    for networks in (plain, checkpointed):
        networks.backward(STUDENT, *predict_and_forget(networks, STUDENT))
    assert checkpointed.denoiser.is_gradient_checkpointing
    assert relative_error(gradients(checkpointed, STUDENT), gradients(plain, STUDENT)) < ROUNDING


@pytest.mark.parametrize("role", TRAINED)
@pytest.mark.usefixtures("float64")
def test_folded_adapters_are_layered_adapters_in_outputs_and_gradients(role: str) -> None:
    layered, folded = make_shared(), make_shared(fold=True)
    outputs = []
    for networks in (layered, folded):
        x0, direction = predict_and_forget(networks, role)
        networks.backward(role, x0, direction)
        outputs.append(x0.detach())
    assert relative_error(outputs[1], outputs[0]) < ROUNDING
    assert relative_error(gradients(folded, role), gradients(layered, role)) < ROUNDING


def test_folding_and_checkpointing_together_are_refused() -> None:
    with pytest.raises(ValueError, match="--fold_adapters and --gradient_checkpointing exclude each other"):
        make_shared(fold=True, checkpointing=True)


def test_a_role_ends_by_putting_back_what_was_worn_before_even_where_it_fails() -> None:
    networks, (x_t, t, conditioning, _) = make_shared(), inputs()

    def worn() -> Tensor:
        return networks.family.denoise(networks.denoiser, x_t, t, conditioning).detach()

    teacher = worn()
    with networks.acting_as(STUDENT):
        student = worn()
        networks.predict(FAKE_SCORE, x_t, t, conditioning)
        assert torch.equal(worn(), student)
        with pytest.raises(RuntimeError, match="stop"), networks.acting_as(FAKE_SCORE):
            raise RuntimeError("stop")
        assert torch.equal(worn(), student)
    assert torch.equal(worn(), teacher)
    assert relative_error(student, teacher) > 0.01
