"""Consistency distillation: the paper's loss, the stock solvers' step, and a consistency function where it rests."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from parts import make_noise_scheduler
from torch import Tensor

from rdm_diffusers.distillation import LCM
from rdm_diffusers.prediction import NoiseSchedule
from rdm_diffusers.schedulers import RdmScheduler

SHAPE = (4, 8, 8)
FLOW, VP = NoiseSchedule(None), NoiseSchedule.from_scheduler(make_noise_scheduler())
SCHEDULES = pytest.mark.parametrize("schedule", [VP, FLOW], ids=["variance_preserving", "flow"])
EVERY = (torch.arange(1000) + 0.5) / 1000  # uniform numbers, so that every whole time is drawn once


def sampler(schedule: NoiseSchedule) -> RdmScheduler:
    """A student's sampler, whose transition is the solver's step."""
    own = {"prediction_type": "flow_prediction"} if schedule.is_flow else {}
    return RdmScheduler(num_train_timesteps=1000, **own)


# ---------------------------------------------------------------------------------------------- the loss


def papers_loss(predict, x_t: Tensor, guided_noise: Tensor, n: int, k: int, huber_c: float) -> Tensor:
    """The loss of LCM (its algorithm 1) in its own notation: f = c_skip x + c_out (x - sigma eps) / alpha."""
    alphas, sigmas = VP.alphas_cumprod.sqrt(), (1 - VP.alphas_cumprod).sqrt()

    def f(x: Tensor, time: int) -> Tensor:
        scaled, data = 10.0 * time, 0.5
        c_skip, c_out = data**2 / (scaled**2 + data**2), scaled / (scaled**2 + data**2) ** 0.5
        return c_skip * x + c_out * (x - sigmas[time] * predict(x, time)) / alphas[time]

    late = n + k
    image = (x_t - sigmas[late] * guided_noise) / alphas[late]
    x_n = alphas[n] * image + sigmas[n] * guided_noise  # DDIM
    difference = f(x_t, late) - f(x_n, n).detach()
    return (torch.sqrt(difference**2 + huber_c**2) - huber_c).mean()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("n", [20, 239, 979])
def test_the_pull_is_minus_the_gradient_of_the_papers_loss(n: int) -> None:
    """But for the boundary scalings, which differ from 0 and 1 by at most 6e-6 of x at these times."""
    objective, solver = LCM(), sampler(VP)
    weight = torch.randn(4, 4)  # a student of one layer
    guided_noise, x_t = torch.randn(2, 3, *SHAPE)

    def predict(x: Tensor, time: int) -> Tensor:
        return torch.einsum("ij,bjhw->bihw", mix, x) * (1 + time / 1000)

    mix = weight.clone().requires_grad_()
    papers_loss(predict, x_t, guided_noise, n, 20, objective.huber_c).backward()
    expected, mix = mix.grad, weight.clone().requires_grad_()

    def student(x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = VP.scales(time, x)
        return (x - sigma * predict(x, int(time[0]))) / alpha

    t, u = objective.times(torch.full((3,), (n + 20.5) / 1000), VP)
    assert t.tolist() == [n + 20] * 3 and u.tolist() == [n] * 3
    alpha, sigma = VP.scales(t, x_t)
    x_u, _ = solver.transition((x_t - sigma * guided_noise) / alpha, x_t, t, u, eta=0.0)
    x0 = student(x_t, t)
    pull = objective.pull(x0.detach(), student(x_u, u).detach())
    x0.backward(-pull / pull.numel())
    assert mix.grad is not None
    torch.testing.assert_close(mix.grad, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    losses = objective.losses(x0.detach(), student(x_u, u).detach())
    mix.grad = None
    assert losses.shape == (3,)
    assert losses.mean().item() == pytest.approx(
        papers_loss(predict, x_t, guided_noise, n, 20, objective.huber_c).item(), rel=1e-3
    )


@pytest.mark.usefixtures("float64")
def test_on_a_flow_teacher_the_pull_is_minus_the_gradient_of_the_loss_along_its_euler_step() -> None:
    objective, solver, shift = LCM(num_ddim_timesteps=25, huber_c=0.05), sampler(FLOW), 3.0
    weight, (velocity, x_t) = torch.randn(4, 4), torch.randn(2, 3, *SHAPE)
    t, u = objective.times(torch.tensor([0.1, 0.5, 0.9]), FLOW, shift)

    def student(mix: Tensor, x: Tensor, time: Tensor) -> Tensor:
        sigma = time.view(-1, 1, 1, 1) / 1000
        return x - sigma * torch.einsum("ij,bjhw->bihw", mix, x) * (1 + sigma)

    levels = torch.tensor([0.9, 0.5, 0.1])
    late, early = (shift * each / (1 + (shift - 1) * each) for each in (levels, levels - 1 / 25))
    mix = weight.clone().requires_grad_()
    x_earlier = x_t + (early - late).view(-1, 1, 1, 1) * velocity
    apart = student(mix, x_t, 1000 * late) - student(mix, x_earlier, 1000 * early).detach()
    ((apart**2 + 0.05**2).sqrt() - 0.05).mean().backward()
    expected, mix = mix.grad, weight.clone().requires_grad_()

    x_u, _ = solver.transition(x_t - t.view(-1, 1, 1, 1) / 1000 * velocity, x_t, t, u, eta=0.0)
    x0 = student(mix, x_t, t)
    pull = objective.pull(x0.detach(), student(mix, x_u, u).detach())
    x0.backward(-pull / pull.numel())
    torch.testing.assert_close(mix.grad, expected)


# ---------------------------------------------------------------------------------------------- the step


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_step_is_ddims_of_as_many_steps(prediction_type: str) -> None:
    settings = {"prediction_type": prediction_type, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    stock = DDIMScheduler.from_config(make_noise_scheduler(**settings).config)
    stock.set_timesteps(50)
    own = RdmScheduler.from_config(stock.config)
    output, x_t = torch.randn(2, 1, *SHAPE)
    t, u = LCM().times(EVERY, VP)
    for time in (999, 759, 500, 20, 19, 7):
        expected = stock.step(output, time, x_t, eta=0.0)
        x0 = own.pred_original_sample(output, torch.tensor([time]), x_t)
        x_u, _ = own.transition(x0, x_t, t[time, None], u[time, None], eta=0.0)
        torch.testing.assert_close(x_u, expected.prev_sample)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_step_is_eulers_between_neighbours_of_the_shifted_grid(shift: float) -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(sigmas=[1 - i / 50 for i in range(50)])
    t, u = LCM().times(torch.arange(50) / 50, FLOW, shift)
    torch.testing.assert_close(t, stock.timesteps.double(), rtol=1e-5, atol=1e-3)  # theirs are float32
    velocity, x_t = torch.randn(2, 1, *SHAPE)
    solver = sampler(FLOW)
    for i, time in enumerate(stock.timesteps):
        expected = stock.step(velocity, time, x_t).prev_sample
        x0 = x_t - t[i] / 1000 * velocity
        x_u, _ = solver.transition(x0, x_t, t[i, None], u[i, None], eta=0.0)
        torch.testing.assert_close(x_u, expected, rtol=1e-4, atol=1e-5)
    assert u[-1] < 1e-9


@SCHEDULES
def test_every_time_is_trained_and_its_earlier_neighbour_is_one_part_of_all_below(schedule: NoiseSchedule) -> None:
    t, u = LCM().times(EVERY, schedule)
    arrived = u < 0
    assert arrived.float().mean() == pytest.approx(1 / 50)
    assert (u[arrived] == -1).all() and t[arrived].max() <= 20
    torch.testing.assert_close((t - u)[~arrived].float(), torch.full((980,), 20.0), rtol=0, atol=1e-3)
    if not schedule.is_flow:
        assert sorted(t.tolist()) == list(range(1000))


# ---------------------------------------------------------------------------------------------- where it rests


def gaussian_step(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, u: Tensor, variance: float) -> Tensor:
    """The solver's step by the exact teacher of data N(0, variance)."""
    alpha, sigma = schedule.scales(t, x_t)
    x0 = alpha * variance / (alpha**2 * variance + sigma**2) * x_t
    return sampler(schedule).transition(x0, x_t, t, u, eta=0.0)[0]


@SCHEDULES
@pytest.mark.usefixtures("float64")
def test_where_the_teachers_solver_ends_is_a_fixed_point(schedule: NoiseSchedule) -> None:
    """What the solver makes of x_t, step by step to the end, and of x_u, is one image: nothing pulls."""
    objective, variance = LCM(), 0.3

    def end(x: Tensor, time: Tensor) -> Tensor:
        for _ in range(51):
            u = torch.where(time - 20 > (0 if schedule.is_flow else -1), time - 20, -1)
            x = torch.where((time < 0).view(-1, 1, 1, 1), x, gaussian_step(schedule, x, time.clamp(min=0), u, variance))
            time = u
        return x

    t, u = objective.times(torch.linspace(0, 0.99, 12), schedule)
    x_t = torch.randn(12, *SHAPE)
    x_u = gaussian_step(schedule, x_t, t, u, variance)
    assert objective.pull(end(x_t, t), end(x_u, u)).abs().max() < 1e-6
    shifted_away = objective.pull(end(x_t, t) + 0.1, end(x_u, u))
    torch.testing.assert_close(shifted_away, torch.full_like(shifted_away, -1.0), rtol=1e-3, atol=0)


@SCHEDULES
@pytest.mark.usefixtures("float64")
def test_the_exact_consistency_function_is_the_fixed_point_of_many_steps(schedule: NoiseSchedule) -> None:
    """On data N(0, v) the ODE's trajectories keep x / sqrt(a^2 v + s^2), so that they end at sqrt(v) times that."""
    variance = 0.3

    def exact(x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = schedule.scales(time.clamp(min=0), x)
        ends = x * (variance / (alpha**2 * variance + sigma**2)).sqrt()
        return torch.where((time < 0).view(-1, 1, 1, 1), x, ends)

    def error(count: int) -> float:
        objective = LCM(num_ddim_timesteps=count)
        t, u = objective.times(torch.linspace(0.05, 0.9, 12), schedule)
        x_t = torch.randn(12, *SHAPE, generator=torch.Generator().manual_seed(0))
        apart = exact(x_t, t) - exact(gaussian_step(schedule, x_t, t, u, variance), u)
        return float(apart.square().mean().sqrt())

    assert error(50) < 0.01  # beside a standard deviation of sqrt(.3)
    assert error(200) < error(50) / 12  # a first-order solver's error in one step falls with its square
