"""A member of the family pulls on the student's prediction and on what the networks make of it, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from parts import make_conditioning, make_shared, relative_error
from parts_float64 import ROUNDING, in_float64
from torch import Tensor

from rdm_diffusers.distillation import (
    GNDM,
    Pull,
    ReverseKL,
    RewardEstimate,
    RunningMeans,
    Samples,
    ascent,
    estimate_reward,
)
from rdm_diffusers.networks import FAKE_SCORE, ROLES, TEACHER, Networks

COUNT = 8


class Product:
    """L = (teacher x0 - fake x0) . (fake x0 - x̂): a loss with gradients in all three."""

    def pull(self, estimate: RewardEstimate) -> Pull:
        gap, residual = estimate.reward, estimate.fake_x0 - estimate.x0
        return Pull(x0=gap, teacher_x0=-residual, fake_x0=residual - gap)


def make_samples() -> tuple[Samples, Tensor, Tensor]:
    """Samples, their re-noising times and noises, always the same."""
    generator = torch.Generator().manual_seed(3)
    x_t, x0, noise = (torch.randn(COUNT, 4, 8, 8, generator=generator) for _ in range(3))
    t = torch.full((COUNT,), 999)
    samples = Samples(x_t, t, x0, torch.zeros(COUNT, dtype=torch.int64), make_conditioning(COUNT))
    return samples, torch.tensor([40, 200, 400, 600, 700, 800, 900, 970]), noise


def product_gradient(networks: Networks, samples: Samples, tau: Tensor, noise: Tensor) -> Tensor:
    """The gradient of the loss `Product` with respect to x̂, by autograd through everything."""
    x0 = samples.x0.clone().requires_grad_()
    x_tau = networks.schedule.add_noise(x0, noise, tau)
    with networks.acting_as(TEACHER):
        teacher = networks.predict(TEACHER, x_tau, tau, samples.conditioning)
    fake = networks.predict(FAKE_SCORE, x_tau, tau, samples.conditioning)
    loss = ((teacher - fake) * (fake - x0)).sum()
    with networks.acting_as(FAKE_SCORE):
        (gradient,) = torch.autograd.grad(loss, x0)
    return gradient


@pytest.fixture(autouse=True)
def numbers_in_float64() -> Iterator[None]:
    with in_float64():
        yield


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("fold", [False, True], ids=["adapters", "folded"])
def test_the_ascent_is_minus_the_whole_gradient_of_a_members_loss(fold: bool, guidance_scale: float) -> None:
    networks, (samples, tau, noise) = make_shared(fold=fold, guidance_scale=guidance_scale), make_samples()
    estimate = estimate_reward(networks, samples, tau, noise)
    found = ascent(networks, samples, estimate, Product().pull(estimate), micro_batch_size=3)
    assert relative_error(found, -product_gradient(networks, samples, tau, noise)) < ROUNDING


def test_a_checkpointed_base_pulls_back_the_same() -> None:
    samples, tau, noise = make_samples()
    found = []
    for checkpointing in (False, True):
        networks = make_shared(checkpointing=checkpointing)
        estimate = estimate_reward(networks, samples, tau, noise)
        found.append(ascent(networks, samples, estimate, Product().pull(estimate)))
    assert relative_error(found[1], found[0]) < ROUNDING


def test_a_pull_back_moves_no_weights_and_its_calls_are_counted() -> None:
    networks, (samples, tau, noise) = make_shared(guidance_scale=3.0), make_samples()
    estimate = estimate_reward(networks, samples, tau, noise)
    before = dict(networks.calls)
    ascent(networks, samples, estimate, Product().pull(estimate))
    assert all(parameter.grad is None for role in ROLES for parameter in networks.parameters(role))
    made = {name: count - before.get(name, 0) for name, count in networks.calls.items()}
    guided = 2 * COUNT
    assert made == {
        "teacher forward": guided, "teacher backward": guided,
        "fake_score forward": COUNT, "fake_score backward": COUNT,
    }  # fmt: skip


def test_the_correction_is_taken_from_the_fake_score_for_every_member() -> None:
    networks, (samples, tau, noise) = make_shared(), make_samples()
    estimate = estimate_reward(networks, samples, tau, noise)
    plain = GNDM(matching=Product(), advantage_normalization="none")
    advantage = plain.advantage(estimate, RunningMeans())
    assert advantage.correction.abs().max() > 0
    wanted = Product().pull(replace(estimate, fake_x0=estimate.fake_x0 - advantage.correction))
    assert torch.equal(advantage.pull.fake_x0, wanted.fake_x0)
    reverse = replace(plain, matching=ReverseKL()).advantage(estimate, RunningMeans())
    assert torch.allclose(reverse.pull.x0, estimate.reward + reverse.correction, atol=1e-6)


def test_a_pull_through_a_network_is_never_dropped_for_want_of_its_place() -> None:
    networks, (samples, tau, noise) = make_shared(), make_samples()
    estimate = replace(estimate_reward(networks, samples, tau, noise), x_tau=None)
    with pytest.raises(ValueError, match="x_tau"):
        ascent(networks, samples, estimate, Product().pull(estimate))
    assert torch.equal(ascent(networks, samples, estimate, ReverseKL().pull(estimate)), estimate.reward)
