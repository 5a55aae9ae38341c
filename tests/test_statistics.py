"""What GNDM measures over a group: the fake score's bias, the normalisers; running means."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from parts import make_estimate, make_noise_scheduler
from torch import Tensor

from rdm_diffusers.distillation import (
    BIAS_ESTIMATORS,
    GNDM,
    NORMALIZATIONS,
    RewardEstimate,
    RunningMeans,
    fake_score_bias,
    leave_one_out_mean,
    normalizer,
    renoising_times,
)
from rdm_diffusers.distillation.advantages import variance_within_groups
from rdm_diffusers.prediction import NoiseSchedule, expand

SHAPE = (8, 4, 8, 8)
GROUP = 4
TEACHER_MEAN = 0.3
SCHEDULES = {
    "variance_preserving": NoiseSchedule.from_scheduler(make_noise_scheduler()),
    "flow": NoiseSchedule(None),
}


def random_estimate() -> RewardEstimate:
    """Two groups of four with random predictions at random scales."""
    x0, teacher, fake = (torch.randn(SHAPE) for _ in range(3))
    return make_estimate(x0, x0 + 0.3 * teacher, x0 + 0.3 * fake, sigma=0.1 + 0.8 * torch.rand(8))


def posterior_mean(mean: float, variance: float, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x_t] of data N(mean, variance)."""
    return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * mean)


def moved_student(schedule: NoiseSchedule, delta: float, variance: float = 1.0) -> tuple[RewardEstimate, Tensor]:
    """R_dm of a student N(delta, v) whose fake score still is that of N(0, v), and the true posterior means."""
    count = 40_000
    x0, tau = delta + variance**0.5 * torch.randn(count, 1, 2, 2), renoising_times(torch.rand(count), schedule)
    alpha, sigma = schedule.scales(tau, x0)
    x_tau = schedule.add_noise(x0, torch.randn_like(x0), tau)
    means = (TEACHER_MEAN, 0.0, delta)
    teacher, fake, true = (posterior_mean(mean, variance, x_tau, alpha, sigma) for mean in means)
    scales = dict(alpha=alpha.flatten(), sigma=sigma.flatten(), tau=tau / 1000)
    return make_estimate(x0, teacher, fake, **scales), true


def corrected(objective: GNDM, e: RewardEstimate) -> Tensor:
    """R' = R + lambda b."""
    return e.reward + objective.advantage(e, RunningMeans()).correction


def by_tau(values: Tensor, e: RewardEstimate) -> Tensor:
    """The mean in each of five bins of tau."""
    bins = (e.tau * 5).long()
    return torch.stack([values[bins == b].mean() for b in range(5)])


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_leave_one_out_mean_is_the_mean_of_the_others(group_size: int) -> None:
    values = torch.randn(SHAPE)
    means = leave_one_out_mean(values, group_size)
    for i in range(len(values)):
        first = i - i % group_size
        others = [values[j] for j in range(first, first + group_size) if j != i]
        assert torch.allclose(means[i], torch.stack(others).mean(0), atol=1e-6)


def test_over_several_states_the_others_are_all_states_of_the_other_rollouts() -> None:
    values = torch.randn(2, 3, GROUP, 5)  # two groups, three states of each rollout
    means = leave_one_out_mean(values.flatten(0, 2), GROUP, states=3).unflatten(0, values.shape[:3])
    for member in range(GROUP):
        others = [j for j in range(GROUP) if j != member]
        expected = values[:, :, others].mean((1, 2))[:, None].expand(-1, 3, -1)
        assert torch.allclose(means[:, :, member], expected, atol=1e-6)


def test_the_bias_is_measured_half_over_the_samples_own_step_and_half_over_all() -> None:
    e = replace(random_estimate(), step=torch.tensor([0] * 4 + [1] * 4))  # one group, two states of each rollout

    def correction(**pooling) -> Tensor:
        return GNDM(group_size=GROUP, **pooling).advantage(e, RunningMeans()).correction

    own, over_all = correction(), correction(steps_per_rollout=2, pool_steps=1.0)
    assert not torch.allclose(own, over_all, atol=1e-2)
    assert torch.allclose(correction(steps_per_rollout=2), (own + over_all) / 2, atol=1e-6)
    assert torch.equal(correction(steps_per_rollout=2, pool_steps=0.0), own)


@pytest.mark.parametrize("estimator", BIAS_ESTIMATORS)
def test_a_group_of_one_shows_no_bias(estimator: str) -> None:
    e = random_estimate()
    assert torch.equal(leave_one_out_mean(e.reward, 1), torch.zeros(SHAPE))
    assert torch.equal(fake_score_bias(e, 1, estimator), torch.zeros(SHAPE))


@pytest.mark.parametrize("estimator", BIAS_ESTIMATORS)
def test_the_bias_is_what_its_formula_says(estimator: str) -> None:
    e = random_estimate()
    residual, share = e.fake_x0 - e.x0, e.sigma**2 / (e.alpha**2 + e.sigma**2)
    bias = fake_score_bias(e, GROUP, estimator)
    for i in range(len(residual)):
        others = [j for j in range(i - i % GROUP, i - i % GROUP + GROUP) if j != i]
        if estimator == "shift":
            expected = share[i] * sum(residual[j] for j in others) / sum(share[j] for j in others)
        else:
            expected = e.sigma[i] * sum(residual[j] / e.sigma[j] for j in others) / 3
        assert torch.allclose(bias[i], expected, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize(("delta", "variance"), [(0.5, 1.0), (-1.0, 1.0), (0.3, 0.1)])
def test_the_shift_estimator_undoes_what_a_fake_score_misses_of_a_student_that_moved(
    schedule: NoiseSchedule, delta: float, variance: float
) -> None:
    e, true = moved_student(schedule, delta, variance)
    wanted = e.teacher_x0 - true
    missed = by_tau(e.reward - wanted, e) / delta
    left = by_tau(corrected(GNDM(group_size=GROUP), e) - wanted, e) / delta
    assert missed.abs().max() > 0.8  # of the shift, at high noise
    assert left.abs().max() < 0.04  # at every noise


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("estimator", BIAS_ESTIMATORS)
def test_a_perfect_fake_score_shows_no_bias_on_average(schedule: NoiseSchedule, estimator: str) -> None:
    e, true = moved_student(schedule, 0.0)
    assert torch.allclose(e.fake_x0, true)
    assert by_tau(fake_score_bias(e, GROUP, estimator), e).abs().max() < 0.04


def test_both_estimators_agree_where_all_tau_are_one() -> None:
    e = random_estimate()
    e = replace(e, alpha=torch.full((8,), 0.8), sigma=torch.full((8,), 0.6))
    shift, noise = (fake_score_bias(e, GROUP, estimator) for estimator in ("shift", "noise"))
    assert torch.allclose(shift, noise, atol=1e-6)
    assert torch.allclose(shift, leave_one_out_mean(e.fake_x0 - e.x0, GROUP), atol=1e-6)


@pytest.mark.parametrize("group_size", [2, 4])
def test_the_variance_within_groups_is_unbiased_and_does_not_count_what_groups_differ_in(group_size: int) -> None:
    x0 = torch.randn(4000, 1, 1, 1).repeat_interleave(group_size, 0) + 0.5 * torch.randn(4000 * group_size, 1, 2, 2)
    statistics = RunningMeans()
    measured = variance_within_groups(make_estimate(x0, x0, x0), group_size, statistics)
    assert measured == pytest.approx(0.25, rel=0.05)
    after = variance_within_groups(make_estimate(2 * x0, x0, x0), group_size, statistics)
    assert 0.25 < after < 1.0  # remembers the update before


@pytest.mark.parametrize("estimator", BIAS_ESTIMATORS)
def test_a_samples_bias_depends_on_the_others_of_its_group_alone(estimator: str) -> None:
    e = random_estimate()
    before = fake_score_bias(e, GROUP, estimator)
    fake = e.fake_x0.clone()
    fake[5] += 10
    after = fake_score_bias(replace(e, fake_x0=fake), GROUP, estimator)
    changed = [not torch.allclose(one, other, atol=1e-5) for one, other in zip(before, after, strict=True)]
    assert changed == [False] * 4 + [True, False, True, True]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_every_normaliser_is_what_it_says(normalization: str) -> None:
    e = random_estimate()
    distance = torch.stack([(e.x0[i] - e.teacher_x0[i]).abs().mean() for i in range(8)])
    reward = e.teacher_x0 - e.fake_x0
    expected = []
    for i in range(8):
        group = range(i - i % GROUP, i - i % GROUP + GROUP)
        mean = sum(reward[j] for j in group) / GROUP
        expected.append(
            {
                "sample": distance[i],
                "group": sum(distance[j] for j in group) / GROUP,
                "batch": distance.mean(),
                "rms": (sum((reward[j] ** 2).mean() for j in group) / GROUP) ** 0.5,
                "std": (sum(((reward[j] - mean) ** 2).mean() for j in group) / GROUP) ** 0.5,
                "none": torch.tensor(1.0),
            }[normalization]
        )
    assert torch.allclose(e.distance, distance)
    assert torch.allclose(normalizer(e, normalization, GROUP), torch.stack(expected))
    advantage = GNDM(group_size=GROUP, gndm_lambda=0.0, advantage_normalization=normalization).advantage(
        e, RunningMeans()
    )
    assert torch.allclose(advantage.pull.x0, reward / expand(torch.stack(expected), reward), rtol=1e-4)
    assert torch.allclose(advantage.normalizer, torch.stack(expected))


def test_a_running_mean_counts_its_first_update_in_full_and_then_forgets_slowly() -> None:
    means = RunningMeans()
    assert means.update("a", torch.tensor(6.0), torch.tensor(2), 0.9) == 3
    value = means.update("a", torch.tensor(10.0), torch.tensor(1), 0.9)
    assert value == pytest.approx((0.9 * 6 + 10) / (0.9 * 2 + 1))
    assert means.mean("a") == value
    assert value.dtype == torch.float32
    with pytest.raises(KeyError):
        means.mean("b")


def test_a_bin_without_samples_keeps_its_mean_and_an_empty_update_changes_nothing() -> None:
    means = RunningMeans()
    assert means.update("a", torch.tensor([6.0, 0.0]), torch.tensor([2, 0]), 0.9).tolist() == [3, 0]
    assert means.update("a", torch.tensor([0.0, 8.0]), torch.tensor([0, 2]), 0.9).tolist() == pytest.approx([3, 4])
    before = means.state["a"].clone()
    means.update("a", torch.zeros(2), torch.zeros(2), 0.9)
    assert torch.equal(means.state["a"], before)


def test_running_means_are_those_of_all_processes_together() -> None:
    means = RunningMeans(reduce=lambda tensor: tensor + torch.tensor([4.0, 3.0]))  # what another process adds
    assert means.update("a", torch.tensor(6.0), torch.tensor(2), 0.9) == 2
