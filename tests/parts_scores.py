"""Small score networks and Gaussians, with which losses are written out as the papers write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from parts import make_conditioning, make_estimate, make_noise_scheduler
from torch import Tensor, nn

from rdm_diffusers.distillation import GNDM, Matching, RunningMeans, Samples, ascent, estimate_reward
from rdm_diffusers.families.sd_unet import StableDiffusionFamily
from rdm_diffusers.networks import FAKE_SCORE, STUDENT, TEACHER, SeparateNetworks
from rdm_diffusers.prediction import NoiseSchedule

SHAPE = (2, 3, 3)
TAU = torch.tensor([30, 200, 400, 500, 600, 700, 850, 960])
SCHEDULES = {
    "v_prediction": NoiseSchedule.from_scheduler(make_noise_scheduler()),
    "flow_prediction": NoiseSchedule(None),
}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # (s_teacher, s_fake, grad log q, a, s) -> [B]


class Perceptron(nn.Module):
    """A network that bends, called as a U-Net is."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        size = SHAPE[0] * SHAPE[1] * SHAPE[2]
        self.body = nn.Sequential(nn.Linear(size + 1, 32), nn.Tanh(), nn.Linear(32, size))

    def forward(self, x_t: Tensor, t: Tensor, embeds: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.body(torch.cat([x_t.flatten(1), t[:, None] / 1000], 1)).view_as(x_t),)


@dataclass(frozen=True)
class Case:
    """A teacher and a fake score, and eight samples of a student."""

    networks: SeparateNetworks
    samples: Samples
    noise: Tensor

    def road(self, matching: Matching, normalization: str = "none") -> Tensor:
        """Where the library moves x̂, in micro-batches of three."""
        estimate = estimate_reward(self.networks, self.samples, TAU, self.noise)
        objective = GNDM(matching=matching, gndm_lambda=0.0, advantage_normalization=normalization, group_size=1)
        pull = objective.advantage(estimate, RunningMeans()).pull
        return ascent(self.networks, self.samples, estimate, pull, micro_batch_size=3)

    def gradient(self, loss: Loss, weight: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """The gradient of a loss of scores with respect to x̂, by automatic differentiation through both networks.

        `weight(x̂, teacher's x0)` `[B]` divides each sample's loss and is held still.
        """
        x0 = self.samples.x0.clone().requires_grad_()
        a, s = self.networks.schedule.scales(TAU, x0)
        x_t = a * x0 + s * self.noise
        s_teacher, s_fake = (self._score(role, x_t, a, s) for role in (TEACHER, FAKE_SCORE))
        losses = loss(s_teacher, s_fake, (a * x0 - x_t) / s**2, a, s)
        if weight is not None:
            losses = losses / weight(x0, (x_t + s**2 * s_teacher) / a).detach()
        return torch.autograd.grad(losses.sum(), x0)[0]

    def _score(self, role: str, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """-eps / s, with eps from the network's own output."""
        output = self.networks.denoisers[role](x_t, TAU, None, False)[0]
        eps = s * x_t + a * output if self.networks.prediction_type == "v_prediction" else x_t + a * output
        return -eps / s


def make_case(prediction_type: str, same: bool = False) -> Case:
    """Two different networks, or with `same` two equal ones."""
    denoisers = {STUDENT: nn.Identity(), FAKE_SCORE: Perceptron(1), TEACHER: Perceptron(1 if same else 2)}
    networks = SeparateNetworks(
        denoisers, family=StableDiffusionFamily(), schedule=SCHEDULES[prediction_type],
        prediction_type=prediction_type, null_conditioning=make_conditioning(1), guidance_scale=1.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(len(TAU), *SHAPE, generator=generator) for _ in range(2))
    zeros = torch.zeros(len(TAU), dtype=torch.int64)
    return Case(networks, Samples(x0, zeros, x0, zeros, make_conditioning(len(TAU))), noise)


@dataclass(frozen=True)
class Gaussian:
    """Numbers x0 of N(mean, std^2); their posterior mean at a x0 + s eps is `slope` x_t + what is left."""

    mean: Tensor
    std: Tensor

    def slope(self, a: Tensor, s: Tensor) -> Tensor:
        return a * self.std**2 / (a**2 * self.std**2 + s**2)

    def posterior_mean(self, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return self.mean + self.slope(a, s) * (x_t - a * self.mean)


def quadrature(nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of standard normal numbers `[N]`, `[N]` and their weights `[N]`, which replace an expectation."""
    points, weights = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(nodes))
    z, eps = torch.meshgrid(points, points, indexing="ij")
    return z.flatten(), eps.flatten(), torch.outer(weights, weights).flatten() / weights.sum() ** 2


def mean_move(
    matching: Matching, student: Gaussian, teacher: Gaussian, a: float, s: float, nodes: int = 40
) -> tuple[Tensor, Tensor]:
    """How the pull moves a Gaussian student's mean and standard deviation, on average, if the fake score is perfect."""
    z, eps, weight = quadrature(nodes)
    a, s = torch.tensor(a), torch.tensor(s)
    x0 = student.mean + student.std * z
    x_t = a * x0 + s * eps
    f, g = teacher.posterior_mean(x_t, a, s), student.posterior_mean(x_t, a, s)
    pull = matching.pull(make_estimate(*(each.view(-1, 1, 1, 1) for each in (x0, f, g))))
    assert pull.teacher_x0 is not None and pull.fake_x0 is not None
    through = teacher.slope(a, s) * pull.teacher_x0 + student.slope(a, s) * pull.fake_x0
    move = (pull.x0 + a * through).flatten()
    return (weight * move).sum(), (weight * move * z).sum()


def distance_descent(
    distance: Callable[[Tensor], Tensor], student: Gaussian, teacher: Gaussian, a: float, s: float, nodes: int = 40
) -> tuple[Tensor, Tensor]:
    """Minus the gradient of E[distance(f - g)] in the student's mean and deviation, over points that are held still."""
    z, eps, weight = quadrature(nodes)
    a, s = torch.tensor(a), torch.tensor(s)
    x_t = a * (student.mean + student.std * z) + s * eps
    moving = Gaussian(student.mean.clone().requires_grad_(), student.std.clone().requires_grad_())
    gap = teacher.posterior_mean(x_t, a, s) - moving.posterior_mean(x_t, a, s)
    mean, std = torch.autograd.grad(-(weight * distance(gap)).sum(), [moving.mean, moving.std])
    return mean, std
