"""Uni-Instruct: its pull, through the networks, is the gradient of the rate at which an f-divergence falls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from parts import make_estimate
from parts_float64 import in_float64
from test_f_distill import ALPHA, MEAN, SIGMA, WIDTH, F, h, log_normal
from torch import Tensor

from rdm_diffusers.distillation import UniInstruct

SLOPE = ALPHA * WIDTH**2 / (ALPHA**2 * WIDTH**2 + SIGMA**2)  # d fake x0 / d x_tau; the teacher's is ALPHA


@pytest.fixture(autouse=True)
def numbers_in_float64() -> Iterator[None]:
    with in_float64():
        yield


def rate(name: str, mean: Tensor, width: Tensor) -> Tensor:
    """E_q[h(r) |s_p - s_q|^2] of a teacher N(0, 1) and a student N(mean, width^2) at the noise level."""
    x, variance = torch.linspace(-12, 12, 24001), ALPHA**2 * width**2 + SIGMA**2
    teacher, student = log_normal(x, 0.0, 1.0), log_normal(x, ALPHA * mean, variance)
    difference = -x + (x - ALPHA * mean) / variance
    return torch.trapezoid(student.exp() * weight(name, (teacher - student).exp()) * difference**2, x)


def weight(name: str, r: Tensor) -> Tensor:
    leaf = r if r.requires_grad else r.clone().requires_grad_()
    return h(name, leaf)


def ascent_of(name: str, x0: Tensor, x_tau: Tensor, ratio: Tensor) -> Tensor:
    """The member's pull on x̂, and those on the exact denoisers' outputs, pulled back to it."""
    teacher_x0, fake_x0 = ALPHA * x_tau, MEAN + SLOPE * (x_tau - ALPHA * MEAN)
    scales = dict(alpha=torch.full_like(x0, ALPHA), sigma=torch.full_like(x0, SIGMA), ratio=ratio)
    estimate = make_estimate(*(each.view(-1, 1, 1, 1) for each in (x0, teacher_x0, fake_x0)))
    pull = UniInstruct(f_divergence=name).pull(replace(estimate, **scales))
    return (pull.x0 + ALPHA * (ALPHA * pull.teacher_x0 + SLOPE * pull.fake_x0)).flatten()


@pytest.mark.parametrize("name", F)
def test_the_pull_is_minus_the_gradient_of_the_rate(name: str) -> None:
    mean, width = (torch.tensor(value, requires_grad=True) for value in (MEAN, WIDTH))
    gradients = torch.autograd.grad(rate(name, mean, width), (mean, width))
    nodes, masses = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(80))
    z, noise = (each.flatten() for each in torch.meshgrid(nodes, nodes, indexing="ij"))
    mass = torch.outer(masses, masses).flatten() / (2 * math.pi)
    x0 = MEAN + WIDTH * z
    x_tau = ALPHA * x0 + SIGMA * noise
    variance = ALPHA**2 * WIDTH**2 + SIGMA**2
    ratio = (log_normal(x_tau, 0.0, 1.0) - log_normal(x_tau, ALPHA * MEAN, variance)).exp()
    ascent = ascent_of(name, x0, x_tau, ratio)
    one = h(name, torch.ones(1, requires_grad=True)).detach()
    unit = SIGMA**4 / (2 * ALPHA**2) / one  # the module's weight of a rate, and h over h(1)
    for moved, gradient in ((torch.ones_like(z), gradients[0]), (z, gradients[1])):  # d x̂ / d mean, d x̂ / d width
        assert torch.allclose((mass * ascent * moved).sum(), -(unit * gradient).squeeze(), rtol=1e-5)


def test_the_reverse_kl_is_sids_loss_with_alpha_a_half() -> None:
    x0, teacher, fake = (torch.randn(3, 4, 2, 2, requires_grad=True) for _ in range(3))
    gap = teacher - fake
    loss = (-0.5 * gap**2 + gap * (teacher - x0)).sum()
    expected = torch.autograd.grad(loss, (x0, teacher, fake))
    estimate = replace(make_estimate(x0.detach(), teacher.detach(), fake.detach()), ratio=torch.ones(3))
    pull = UniInstruct(f_divergence="reverse_kl").pull(estimate)
    for found, gradient in zip((pull.x0, pull.teacher_x0, pull.fake_x0), expected, strict=True):
        assert torch.allclose(found, -gradient)


def test_the_forward_kl_pulls_nothing_where_the_ratio_is_zero() -> None:
    estimate = replace(make_estimate(*torch.randn(3, 3, 4, 2, 2)), ratio=torch.zeros(3))
    pull = UniInstruct(f_divergence="forward_kl").pull(estimate)
    assert not any(each.any() for each in (pull.x0, pull.teacher_x0, pull.fake_x0))
