"""f-distill: each divergence's weight is right, and its pull is the gradient of the divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from parts import make_estimate
from parts_float64 import in_float64
from torch import Tensor

from rdm_diffusers.distillation import F_DIVERGENCES, GNDM, FDistill, RunningMeans
from rdm_diffusers.distillation.divergences import weights

F: dict[str, Callable[[Tensor], Tensor]] = {  # f of D_f(p || q) = E_q[f(p / q)], from the paper's table
    "reverse_kl": lambda r: -r.log(),
    "softened_reverse_kl": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
}
ALPHA, SIGMA, MEAN, WIDTH = 0.8, 0.6, 0.4, 0.9  # of the noise level; of the student, beside a teacher of N(0, 1)
every = pytest.mark.parametrize("name", F)


@pytest.fixture(autouse=True)
def numbers_in_float64() -> Iterator[None]:
    with in_float64():
        yield


def h(name: str, r: Tensor) -> Tensor:
    """r^2 f''(r), by automatic differentiation, with its graph."""
    (first,) = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r, create_graph=True)
    return r**2 * second


def test_every_divergence_has_a_weight() -> None:
    assert set(F_DIVERGENCES) == set(F)


@every
def test_a_weight_and_its_derivatives_are_those_of_f(name: str) -> None:
    r = torch.tensor([0.01, 0.3, 1.0, 2.5, 40.0], requires_grad=True)
    one = h(name, torch.ones(1, requires_grad=True)).detach()
    wanted = h(name, r)
    (slope,) = torch.autograd.grad(wanted.sum(), r, create_graph=True, allow_unused=True)
    slope = torch.zeros_like(r) if slope is None else slope
    curvature = torch.autograd.grad(slope.sum(), r, allow_unused=True)[0] if slope.requires_grad else None
    found = weights(name, r.detach())
    expected = (wanted, r * slope, 0 * r if curvature is None else r**2 * curvature)
    assert all(torch.allclose(mine, other / one, atol=1e-8) for mine, other in zip(found, expected, strict=True))


def log_normal(x: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    variance = torch.as_tensor(variance)
    return -((x - mean) ** 2) / (2 * variance) - 0.5 * (2 * math.pi * variance).log()


@every
def test_the_pull_is_minus_the_gradient_of_the_divergence_at_a_noise_level(name: str) -> None:
    x, mean = torch.linspace(-12, 12, 24001), torch.tensor(MEAN, requires_grad=True)
    variance = ALPHA**2 * WIDTH**2 + SIGMA**2
    teacher, student = log_normal(x, 0.0, 1.0), log_normal(x, ALPHA * mean, variance)
    divergence = torch.trapezoid(student.exp() * F[name]((teacher - student).exp()), x)
    (gradient,) = torch.autograd.grad(divergence, mean)
    # The posterior means of N(0, 1) and of N(MEAN, WIDTH^2), given x_tau = x.
    teacher_x0 = ALPHA * x
    fake_x0 = MEAN + ALPHA * WIDTH**2 / variance * (x - ALPHA * MEAN)
    estimate = make_estimate(x.view(-1, 1, 1, 1), *(each.view(-1, 1, 1, 1) for each in (teacher_x0, fake_x0)))
    estimate = replace(estimate, ratio=(teacher - student).exp().detach())
    pull = FDistill(f_divergence=name).pull(estimate).x0.flatten()
    one = h(name, torch.ones(1, requires_grad=True)).detach()
    # d x_tau / d mean = a, and the difference of the scores is a / s^2 R.
    found = torch.trapezoid(student.detach().exp() * pull * one, x) * ALPHA**2 / SIGMA**2
    assert torch.allclose(found, -gradient, rtol=1e-6)


def test_the_reverse_kl_is_dmd_and_without_a_discriminator_there_is_no_ratio() -> None:
    estimate = make_estimate(*torch.randn(3, 4, 4, 8, 8))
    judged = replace(estimate, logit=torch.randn(4))
    pulls = [
        GNDM(matching=member, gndm_lambda=0.0).advantage(judged, RunningMeans()).pull.x0
        for member in (FDistill("reverse_kl"), GNDM().matching)
    ]
    assert torch.equal(*pulls)
    with pytest.raises(ValueError, match="needs a discriminator"):
        FDistill().pull(estimate)
    with pytest.raises(ValueError, match="Unknown f-divergence 'kl'"):
        weights("kl", torch.ones(2))


def test_likelier_samples_weigh_more_for_the_forward_divergences_alone() -> None:
    r = torch.tensor([0.1, 1.0, 10.0])
    for name, rises in (("forward_kl", 1), ("jensen_shannon", 1), ("reverse_kl", 0), ("softened_reverse_kl", -1)):
        found = weights(name, r)[0]
        assert found[1] == 1
        assert ((found[2] - found[0]).sign()) == rises
