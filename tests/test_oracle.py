"""The analytic oracle: mixtures of Gaussians in the plane, whose exact denoisers are known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from diffusers.training_utils import EMAModel
from parts import make_conditioning, make_noise_scheduler
from torch import Tensor, nn

from rdm_diffusers.distillation import (
    DMD,
    GNDM,
    Draws,
    RunningMeans,
    Samples,
    ScoreIdentity,
    ScoreImplicit,
    ascent,
    collect_samples,
    draw_samples,
    estimate_reward,
    fake_score_direction,
    renoising_times,
    rollout,
    trained_places,
)
from rdm_diffusers.families.sd_unet import StableDiffusionFamily
from rdm_diffusers.networks import FAKE_SCORE, STUDENT, TEACHER, SeparateNetworks
from rdm_diffusers.prediction import NoiseSchedule
from rdm_diffusers.schedulers import RdmScheduler

SHAPE = (1, 1, 2)  # a point of the plane, as a latent
SCHEDULE = NoiseSchedule.from_scheduler(make_noise_scheduler())
GROUPS, GROUP, STEPS, UPDATES = 16, 4, 2, 600


@dataclass(frozen=True)
class Mixture:
    """Equal Gaussians of one width on a circle; noised to time t it is a mixture again, so all is in closed form."""

    radius: float
    width: float = 0.2
    modes: int = 5
    turn: float = 0.0

    @property
    def means(self) -> Tensor:
        angles = torch.arange(self.modes) * 2 * math.pi / self.modes + self.turn
        return self.radius * torch.stack([angles.cos(), angles.sin()], 1).double()

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p_t of points `[B, 2]`, float64, up to a constant for each t."""
        alpha, sigma = SCHEDULE.alpha(t).double()[:, None], SCHEDULE.sigma(t).double()[:, None]
        squared = (x_t[:, None] - alpha[..., None] * self.means).square().sum(2)
        return (-squared / (2 * (alpha**2 * self.width**2 + sigma**2))).logsumexp(1)

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The gradient of log p_t at points `[B, 2]`, float64, by automatic differentiation."""
        x_t = x_t.double().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.log_density(x_t, t).sum(), x_t)[0]

    def posterior_mean(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t] at points `[B, 2]`, float64: each Gaussian's own, weighed by its responsibility."""
        x_t, means = x_t.double()[:, None], self.means
        alpha, sigma = SCHEDULE.alpha(t).double()[:, None, None], SCHEDULE.sigma(t).double()[:, None, None]
        variance = alpha**2 * self.width**2 + sigma**2
        responsibility = (-(x_t - alpha * means).square().sum(2, keepdim=True) / (2 * variance)).softmax(1)
        return (responsibility * (means + alpha * self.width**2 / variance * (x_t - alpha * means))).sum(1)

    def sample(self, count: int) -> Tensor:
        """Clean points `[count, 2]`."""
        return self.means[torch.randint(self.modes, (count,))].float() + self.width * torch.randn(count, 2)


class ExactDenoiser(nn.Module):
    """A mixture's posterior mean, called as a U-Net is."""

    def __init__(self, mixture: Mixture):
        super().__init__()
        self.mixture = mixture

    def forward(self, x_t: Tensor, t: Tensor, embeds: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.mixture.posterior_mean(x_t.flatten(1), t).view_as(x_t).float(),)


class LearnedDenoiser(nn.Module):
    """A small perceptron with a skip connection, called as a U-Net is."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(5, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x_t: Tensor, t: Tensor, embeds: Tensor, return_dict: bool) -> tuple[Tensor]:
        alpha, sigma = SCHEDULE.scales(t, x_t)
        phase = torch.stack([t / 1000, SCHEDULE.alpha(t), SCHEDULE.sigma(t)], 1)
        output = self.body(torch.cat([x_t.flatten(1), phase], 1)).view_as(x_t)
        return (alpha * x_t + sigma * output,)


def make_networks(student: nn.Module, fake: nn.Module, teacher: Mixture) -> SeparateNetworks:
    """Three roles whose output is x0; the teacher is exact."""
    denoisers = {STUDENT: student, FAKE_SCORE: fake, TEACHER: ExactDenoiser(teacher)}
    return SeparateNetworks(
        denoisers,
        family=StableDiffusionFamily(),
        schedule=SCHEDULE,
        prediction_type="sample",
        null_conditioning=make_conditioning(1),
        guidance_scale=1.0,
    )


def distance(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """The sliced 2-Wasserstein distance of two sets of points `[N, 2]`."""
    angles = torch.arange(directions) * math.pi / directions
    project = torch.stack([angles.cos(), angles.sin()])
    return float(((a @ project).sort(0).values - (b @ project).sort(0).values).square().mean().sqrt())


def draw(networks: SeparateNetworks, scheduler: RdmScheduler, count: int) -> Tensor:
    """The student's points `[count, 2]`."""
    noise = [torch.randn(count, *SHAPE) for _ in range(STEPS)]
    conditioning = make_conditioning(1).expand(count)
    return draw_samples(partial(networks.predict, STUDENT), scheduler, noise, conditioning).flatten(1)


def pretrain(networks: SeparateNetworks, target: Mixture) -> None:
    """Teaches the student to denoise the target, and copies it to the fake score: both start as the teacher."""
    optimizer = torch.optim.Adam(networks.parameters(STUDENT), 2e-3)
    for _ in range(1000):
        x0, t = target.sample(256).view(-1, *SHAPE), torch.randint(1000, (256,))
        x_t = SCHEDULE.add_noise(x0, torch.randn_like(x0), t)
        prediction = networks.predict(STUDENT, x_t, t, make_conditioning(1).expand(256))
        (prediction - x0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    networks.denoisers[FAKE_SCORE].load_state_dict(networks.denoisers[STUDENT].state_dict())


def distil(networks: SeparateNetworks, scheduler: RdmScheduler, objective: GNDM, fake_updates: int) -> None:
    """The training step in its plainest form, on one prompt; leaves the moving average as the student."""
    draws = Draws(seed=0, group_size=GROUP)
    conditioning = make_conditioning(1).expand(GROUPS * GROUP)
    optimizers = {role: torch.optim.Adam(networks.parameters(role), 1e-3) for role in (STUDENT, FAKE_SCORE)}
    average, statistics = EMAModel(networks.parameters(STUDENT), decay=0.99), RunningMeans()

    def step(role: str, x0: Tensor, direction: Tensor) -> None:
        networks.backward(role, x0, direction)
        optimizers[role].step()
        optimizers[role].zero_grad()

    for update in range(UPDATES):
        groups = range(update * GROUPS, (update + 1) * GROUPS)
        noise = [draws.normal(f"rollout/{k}", groups, SHAPE) for k in range(STEPS)]
        states = rollout(partial(networks.predict, STUDENT), scheduler, noise, conditioning)
        steps = [draws.subset("steps", group, 1, of=STEPS) for group in groups]
        samples = collect_samples(states, trained_places(steps, GROUP), conditioning)
        tau = renoising_times(draws.uniform("tau", groups), SCHEDULE)
        estimate = estimate_reward(networks, samples, tau, draws.normal("tau_noise", groups, SHAPE))
        x0 = networks.predict(STUDENT, samples.x_t, samples.t, samples.conditioning)
        move = ascent(networks, samples, estimate, objective.advantage(estimate, statistics).pull)
        step(STUDENT, x0, -move / move.numel())
        average.step(networks.parameters(STUDENT))
        for repeat in range(fake_updates):
            t = (draws.uniform(f"fake_time/{repeat}", groups) * 1000).long()
            x_t = SCHEDULE.add_noise(samples.x0, draws.normal(f"fake_noise/{repeat}", groups, SHAPE), t)
            prediction = networks.predict(FAKE_SCORE, x_t, t, samples.conditioning)
            direction, _ = fake_score_direction(prediction, samples.x0, torch.ones(len(t)), len(samples))
            step(FAKE_SCORE, prediction, direction)
    average.copy_to(networks.parameters(STUDENT))


def some_samples(points: Tensor) -> Samples:
    """Points as the student's predictions."""
    x0 = points.view(-1, *SHAPE)
    zeros = torch.zeros(len(x0), dtype=torch.int64)
    return Samples(x0, zeros, x0, zeros, make_conditioning(1).expand(len(x0)))


def test_the_posterior_mean_of_the_oracle_obeys_tweedies_formula() -> None:
    mixture, t = Mixture(1.2), torch.randint(20, 980, (256,))
    x_t = torch.randn(256, 2).double()
    alpha, sigma = SCHEDULE.alpha(t).double()[:, None], SCHEDULE.sigma(t).double()[:, None]
    tweedie = (x_t + sigma**2 * mixture.score(x_t, t)) / alpha
    assert torch.allclose(mixture.posterior_mean(x_t, t), tweedie, atol=1e-9)


def test_r_dm_is_sigma_squared_over_alpha_times_the_difference_of_the_scores() -> None:
    target, student = Mixture(1.2), Mixture(0.8, turn=0.4)
    networks = make_networks(nn.Identity(), ExactDenoiser(student), target)
    samples, tau = some_samples(student.sample(512)), torch.randint(20, 980, (512,))
    noise = torch.randn(512, *SHAPE)
    estimate = estimate_reward(networks, samples, tau, noise, micro_batch_size=100)
    x_tau = SCHEDULE.add_noise(samples.x0, noise, tau).flatten(1)
    alpha, sigma = SCHEDULE.alpha(tau).double()[:, None], SCHEDULE.sigma(tau).double()[:, None]
    expected = sigma**2 / alpha * (target.score(x_tau, tau) - student.score(x_tau, tau))
    assert torch.allclose(estimate.reward.flatten(1).double(), expected, atol=1e-5)
    assert expected.norm(dim=1).mean() > 0.1


def test_an_exact_fake_score_leaves_residuals_that_average_to_nothing_and_a_wrong_one_does_not() -> None:
    student, count = Mixture(0.8, turn=0.4), 20_000
    samples, noise = some_samples(student.sample(count)), torch.randn(count, *SHAPE)
    tau = torch.full((count,), 500)
    exact = make_networks(nn.Identity(), ExactDenoiser(student), student)
    wrong = make_networks(nn.Identity(), ExactDenoiser(Mixture(0.8, modes=1)), student)
    estimates = [estimate_reward(networks, samples, tau, noise) for networks in (exact, wrong)]
    means = [(estimate.fake_x0 - estimate.x0).mean(0).norm() for estimate in estimates]
    assert means[0] < 0.02
    assert means[1] > 0.3


def test_the_log_ratio_is_higher_for_samples_nearer_to_the_teacher() -> None:
    target, student, count = Mixture(1.2), Mixture(0.8), 4000
    networks = make_networks(nn.Identity(), ExactDenoiser(student), target)
    tau, noise = torch.full((count,), 200), torch.randn(count, *SHAPE)
    ratios = [estimate_reward(networks, some_samples(m.sample(count)), tau, noise).log_ratio for m in (target, student)]
    assert ratios[0].mean() > 0 > ratios[1].mean()


SID = GNDM(matching=ScoreIdentity(), group_size=GROUP, gndm_lambda=0.0, advantage_normalization="sample")
SIM = GNDM(matching=ScoreImplicit(), group_size=GROUP, gndm_lambda=0.0, advantage_normalization="none")


@pytest.mark.parametrize(
    ("objective", "fake_updates"),
    [(DMD(group_size=GROUP), 5), (GNDM(group_size=GROUP), 2), (SID, 2), (SIM, 2)],
    ids=["dmd", "gndm", "sid", "sim"],
)
def test_a_short_distillation_at_least_halves_the_distance_to_the_target(objective: GNDM, fake_updates: int) -> None:
    target = Mixture(radius=1.5, width=0.3, modes=3)
    networks = make_networks(LearnedDenoiser(), LearnedDenoiser(), target)
    scheduler = RdmScheduler(prediction_type="sample")
    scheduler.set_timesteps(STEPS)
    pretrain(networks, target)
    points = target.sample(4000)
    before = distance(draw(networks, scheduler, 4000), points)
    distil(networks, scheduler, objective, fake_updates)
    after = distance(draw(networks, scheduler, 4000), points)
    assert after < before / 2  # over seeds it was a third
