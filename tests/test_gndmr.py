"""GNDMR: rewards of any scale joined with R_dm, their exact gradients, and what invalid rewards may not do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from parts_float64 import ROUNDING
from torch import Tensor

from rdm_diffusers.distillation import (
    GNDMR,
    RewardGradient,
    RunningMeans,
    Samples,
    differentiable_gradients,
    reward_values,
)
from rdm_diffusers.families import Conditioning
from rdm_diffusers.training.external_rewards import ExternalRewards

COUNT, GROUP = 8, 4
SHAPE = (COUNT, 3, 4, 4)
PROMPTS = [f"prompt {i}" for i in range(COUNT)]


@dataclass(frozen=True)
class Linear:
    """A weighted sum of the pixels, with the gradient `scale * weights` everywhere; `value` for the broken prompts."""

    weights: Tensor
    name: str = "linear"
    differentiable: bool = True
    scale: float = 1.0
    broken: tuple[str, ...] = ()
    value: float = torch.nan

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        sums = self.scale * (images * self.weights).flatten(1).sum(1)
        return torch.stack([s * self.value if p in self.broken else s for p, s in zip(prompts, sums, strict=True)])


@dataclass(frozen=True)
class BlackBox(Linear):
    """The same as numbers from elsewhere, which no gradient can pass."""

    name: str = "box"
    differentiable: bool = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        assert not images.requires_grad
        assert not torch.is_grad_enabled()
        return super().__call__(images, prompts).numpy().tolist()


def decode(latents: Tensor) -> Tensor:
    """An autoencoder of which everything is known."""
    return 2 * latents


def weights() -> Tensor:
    return torch.randn(SHAPE[1:])


def gradient(
    scale: float = 1.0, invalid: Sequence[int] = (), value: float = torch.nan, offset: float = 0.0
) -> RewardGradient:
    """A reward's numbers and direction, the same but for the scale and the offset, with some samples invalid."""
    generator = torch.Generator().manual_seed(3)
    values, directions = torch.randn(COUNT, generator=generator), torch.randn(SHAPE, generator=generator)
    values = scale * values + offset
    values[list(invalid)] = value
    return RewardGradient.of(values, scale * directions)


def rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a.flatten(1), b.expand_as(a).flatten(1), dim=1)


def exact(reward: Linear, x0: Tensor, micro: int = COUNT) -> RewardGradient:
    """A reward's exact gradient."""
    return differentiable_gradients([reward], decode, x0, PROMPTS[: len(x0)], micro)[0]


def test_a_gradient_is_exact_through_the_decoder_and_keeps_no_graph() -> None:
    reward, x0 = Linear(weights()), torch.randn(SHAPE, requires_grad=True)
    found = exact(reward, x0)
    assert torch.allclose(found.gradient, (2 * reward.weights).expand(SHAPE), atol=1e-6)
    assert torch.allclose(found.values, reward(decode(x0), PROMPTS).detach(), atol=1e-5)
    assert not (found.gradient.requires_grad or found.values.requires_grad or x0.grad is not None)


@pytest.mark.usefixtures("float64")
def test_micro_batches_of_pictures_change_nothing() -> None:
    reward, x0 = Linear(weights()), torch.randn(SHAPE)
    whole, pieces = exact(reward, x0), exact(reward, x0, micro=3)
    assert torch.allclose(pieces.gradient, whole.gradient, atol=ROUNDING)
    assert torch.allclose(pieces.values, whole.values, atol=ROUNDING)
    box = BlackBox(reward.weights)
    for micro in (COUNT, 3):
        assert torch.allclose(reward_values([box], decode, x0, PROMPTS, micro)[0], whole.values, atol=ROUNDING)


@pytest.mark.parametrize("kind", [Linear, BlackBox])
def test_one_decoding_serves_two_rewards_as_two_would(kind: type[Linear]) -> None:
    rewards, x0, decoded = [kind(weights()), kind(weights())], torch.randn(SHAPE), []

    def counted(latents: Tensor) -> Tensor:
        decoded.append(len(latents))
        return decode(latents)

    def scores(asked: list[Linear]) -> list[Tensor]:
        if kind is BlackBox:
            return reward_values(asked, counted, x0, PROMPTS, COUNT)
        found = differentiable_gradients(asked, counted, x0, PROMPTS, COUNT)
        return [torch.cat([each.values[:, None], each.gradient.flatten(1)], 1) for each in found]

    together = scores(rewards)
    assert sum(decoded) == COUNT
    for found, reward in zip(together, rewards, strict=True):
        assert torch.equal(found, scores([reward])[0])


def test_without_rewards_nothing_is_decoded() -> None:
    def refuse(latents: Tensor) -> Tensor:
        raise AssertionError("decoded")

    assert differentiable_gradients([], refuse, torch.randn(SHAPE), PROMPTS, COUNT) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_reward_that_is_not_finite_marks_its_own_sample_invalid(value: float) -> None:
    found = exact(Linear(weights(), broken=("prompt 2",), value=value), torch.randn(SHAPE))
    assert found.valid.tolist() == [True] * 2 + [False] + [True] * 5
    assert not found.gradient[2].any()
    assert found.gradient.isfinite().all()
    assert found.gradient[[0, 1, 3]].abs().flatten(1).sum(1).min() > 0


def test_a_gradient_that_is_not_finite_is_invalid_even_where_its_reward_is() -> None:
    directions = torch.ones(SHAPE)
    directions[1, 0, 0, 0] = torch.inf
    found = RewardGradient.of(torch.ones(COUNT), directions)
    assert found.valid.tolist() == [True, False] + [True] * 6
    assert not found.gradient[1].any()


def advantage() -> Tensor:
    """d, always the same."""
    return 0.5 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))


def combine(combination: GNDMR, updates: int = 1, **gradients: RewardGradient) -> tuple[Tensor, RunningMeans]:
    """The joined direction after so many updates with these gradients, and the statistics."""
    statistics = RunningMeans()
    for _ in range(updates):
        joined = combination.combine(advantage(), gradients, statistics)
    return joined, statistics


def test_a_share_is_rho_times_the_size_of_r_dm_in_proportion_to_the_weights() -> None:
    joined, _ = combine(GNDMR(group_size=GROUP, weights={"a": 1.0}, reward_share=0.3), a=gradient(7.0))
    part = joined - advantage()
    assert rms(part) == pytest.approx(0.3 * rms(advantage()).item(), rel=1e-4)
    assert torch.allclose(cosine(part, gradient().gradient), torch.ones(COUNT))
    other = RewardGradient.of(torch.randn(COUNT), torch.randn(SHAPE))
    joined, _ = combine(GNDMR(group_size=GROUP, weights={"a": 3.0, "b": -1.0}, reward_share=0.4), a=gradient(), b=other)
    unit = {"a": gradient().gradient / rms(gradient().gradient), "b": other.gradient / rms(other.gradient)}
    expected = 0.4 * rms(advantage()) * (3 * unit["a"] - unit["b"]) / 4
    assert torch.allclose(joined - advantage(), expected, atol=1e-5)


def test_multiplying_a_reward_by_a_hundred_changes_nothing_in_share() -> None:
    combination = GNDMR(group_size=GROUP, weights={"a": 1.0, "b": -2.0})
    plain, _ = combine(combination, 3, a=gradient(), b=gradient(0.5))
    scaled, _ = combine(combination, 3, a=gradient(100, offset=5.0), b=gradient(0.5))
    assert torch.allclose(scaled, plain, atol=1e-6)
    assert not torch.allclose(plain, advantage(), atol=1e-2)


def test_multiplying_all_weights_by_ten_changes_nothing_in_share_and_turning_a_sign_turns_the_part() -> None:
    found = {"a": gradient(), "b": RewardGradient.of(torch.randn(COUNT), torch.randn(SHAPE))}
    one, _ = combine(GNDMR(group_size=GROUP, weights={"a": 1.0, "b": 2.0}), **found)
    ten, _ = combine(GNDMR(group_size=GROUP, weights={"a": 10.0, "b": 20.0}), **found)
    turned, _ = combine(GNDMR(group_size=GROUP, weights={"a": -1.0, "b": -2.0}), **found)
    assert torch.allclose(ten, one, atol=1e-6)
    assert torch.allclose(turned - advantage(), advantage() - one, atol=1e-6)


def test_a_reward_that_is_satisfied_fades_in_share() -> None:
    combination, statistics = GNDMR(group_size=GROUP, weights={"a": 1.0}), RunningMeans()
    for _ in range(100):
        strong = combination.combine(advantage(), {"a": gradient()}, statistics) - advantage()
    for _ in range(300):
        weak = combination.combine(advantage(), {"a": gradient(0.01)}, statistics) - advantage()
    assert rms(weak) < 0.05 * rms(strong)


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_a_gradient_beyond_all_bounds_neither_takes_over_nor_spoils_the_statistics(scale: float) -> None:
    rule, statistics = GNDMR(group_size=GROUP, weights={"a": 1.0}), RunningMeans()
    joined = rule.combine(advantage(), {"a": gradient(scale)}, statistics)
    assert rms(joined - advantage()) < 0.21 * rms(advantage())
    assert all(state.isfinite().all() for state in statistics.state.values())
    joined = rule.combine(advantage(), {"a": gradient()}, statistics)
    assert rms(joined - advantage()) > 0.1 * rms(advantage())


@pytest.mark.parametrize("name", ["advantage", "R_dm", "power", "a/b"])
def test_a_rewards_name_may_be_any(name: str) -> None:
    found, rule = {name: gradient(100.0)}, GNDMR(group_size=GROUP, weights={name: 1.0})
    joined, _ = combine(rule, 3, **found)
    assert torch.allclose(joined, combine(GNDMR(group_size=GROUP, weights={"a": 1.0}), 3, a=gradient(100.0))[0])


def test_a_sum_scales_with_the_reward_and_its_weight() -> None:
    part = combine(GNDMR(group_size=GROUP, weights={"a": 1.0}, reward_combination="sum"), a=gradient())[0] - advantage()
    for weight, scale in ((1.0, 100.0), (100.0, 1.0), (-100.0, -1.0)):
        joined, _ = combine(GNDMR(group_size=GROUP, weights={"a": weight}, reward_combination="sum"), a=gradient(scale))
        assert torch.allclose(joined - advantage(), 100 * part, rtol=1e-3, atol=1e-2)


def test_a_sums_direction_is_autograds_gradient_of_the_added_losses() -> None:
    rewards = {"a": (Linear(weights(), "a"), 0.7), "b": (Linear(weights() ** 3, "b"), -0.2)}
    x0 = torch.randn(SHAPE, requires_grad=True)
    loss = 0.5 * (x0 - (x0 + advantage()).detach()).square().mean()
    loss = loss - sum(weight * (reward(decode(x0).tanh(), PROMPTS)).mean() for reward, weight in rewards.values())
    expected = torch.autograd.grad(loss, x0)[0]
    exact = [reward for reward, _ in rewards.values()]
    found = differentiable_gradients(exact, lambda latents: decode(latents).tanh(), x0, PROMPTS, 3)
    combination = GNDMR(
        group_size=GROUP, weights={name: weight for name, (_, weight) in rewards.items()}, reward_combination="sum"
    )
    joined, _ = combine(combination, **dict(zip("ab", found, strict=True)))
    assert torch.allclose(-joined / joined.numel(), expected, atol=1e-6)


@pytest.mark.parametrize("combination", ["share", "sum"])
def test_an_invalid_sample_is_trained_by_r_dm_alone_and_counts_in_no_statistic(combination: str) -> None:
    rule, states = GNDMR(group_size=GROUP, weights={"a": 1.0}, reward_combination=combination), []
    for value in (torch.nan, torch.inf):
        joined, statistics = combine(rule, 2, a=gradient(invalid=(1, 6), value=value))
        assert torch.equal(joined[[1, 6]], advantage()[[1, 6]])
        assert not torch.allclose(joined[0], advantage()[0], atol=1e-3)
        states.append(statistics.state)
    assert all(torch.equal(state, states[1][name]) for name, state in states[0].items())
    kept = [0, 2, 3, 4, 5, 7]
    values = gradient().values
    spread = torch.stack([values[group].var(correction=0) for group in ([0, 2, 3], [4, 5, 7])]).mean()
    assert statistics.mean("reward_variance/a") == pytest.approx(spread.item(), rel=1e-5)
    if combination == "share":
        part = (joined - advantage())[kept]
        assert rms(part) == pytest.approx(0.2 * rms(advantage()[kept]).item(), rel=1e-4)


@pytest.mark.parametrize("combination", ["share", "sum"])
@pytest.mark.parametrize("healthy_before", [0, 2])
def test_where_all_are_invalid_the_step_is_r_dms_and_the_statistics_stay(combination: str, healthy_before: int) -> None:
    rule, statistics = (
        GNDMR(group_size=GROUP, weights={"a": 1.0}, reward_combination=combination, projection_guard=True),
        RunningMeans(),
    )
    for _ in range(healthy_before):
        rule.combine(advantage(), {"a": gradient()}, statistics)
    before = {name: value.clone() for name, value in statistics.state.items()}
    joined = rule.combine(advantage(), {"a": gradient(invalid=range(COUNT))}, statistics)
    assert torch.equal(joined, advantage())
    for name, value in statistics.state.items():
        assert torch.equal(value, before.get(name, torch.zeros_like(value)))


@pytest.mark.parametrize("combination", ["share", "sum"])
def test_the_guard_removes_from_each_sample_what_opposes_r_dm_and_nothing_else(combination: str) -> None:
    rule = dict(group_size=GROUP, weights={"a": 1.0}, reward_share=0.9, reward_combination=combination)
    free, guarded = (combine(GNDMR(**rule, projection_guard=guard), a=gradient())[0] for guard in (False, True))
    d = advantage()
    overlap = {name: ((j - d) * d).flatten(1).sum(1) for name, j in (("free", free), ("guarded", guarded))}
    opposed = overlap["free"] < 0
    assert 0 < opposed.sum() < COUNT
    assert overlap["guarded"][opposed].abs().max() < 1e-3 * overlap["free"].abs().max()
    assert torch.equal(guarded[~opposed], free[~opposed])
    removed = free[opposed] - guarded[opposed]
    assert torch.allclose(cosine(removed, d[opposed]), -torch.ones(int(opposed.sum())), atol=1e-4)


def make_rewards(*rewards: Linear, share: float = 0.2) -> ExternalRewards:
    """A run's rewards, all of weight 1."""
    combination = GNDMR(group_size=GROUP, weights={r.name: 1.0 for r in rewards}, reward_share=share)
    return ExternalRewards(rewards=rewards, combination=combination, decode=decode, micro_batch_size=COUNT)


def make_samples() -> Samples:
    """Two groups, one of the first and one of the third step, always the same."""
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    step = torch.tensor([0] * 4 + [2] * 4)
    return Samples(x0, step, x0, step, Conditioning({"prompt_embeds": torch.zeros(COUNT, 1)}))


def join(reward: Linear, share: float = 0.2) -> tuple[Tensor, dict]:
    """What a run's rewards make of d, after two updates, and the health numbers."""
    rewards, statistics = make_rewards(reward, share=share), RunningMeans()
    for _ in range(2):
        joined, health = rewards.join(advantage(), make_samples(), PROMPTS, statistics)
    return joined, health


def test_a_runs_rewards_may_have_any_scale() -> None:
    pixels = weights()
    plain, scaled = (join(Linear(pixels, scale=scale))[0] for scale in (1.0, 100.0))
    assert torch.allclose(scaled, plain, atol=1e-4)
    assert rms(plain - advantage()) == pytest.approx(0.2 * rms(advantage()).item(), rel=1e-3)


@pytest.mark.parametrize("kind", [Linear, BlackBox])
def test_a_runs_rewards_report_means_spreads_and_invalid_shares(kind: type[Linear]) -> None:
    reward = kind(weights(), "box", broken=("prompt 1", "prompt 2"), differentiable=kind is Linear)
    samples, statistics = make_samples(), RunningMeans()
    rewards = make_rewards(reward)
    health = rewards.tilt(samples, PROMPTS, statistics)[1] | rewards.join(advantage(), samples, PROMPTS, statistics)[1]
    assert health["reward_invalid/box"] == 0.25
    assert {"reward/box", "reward/box/step_3", "reward_std/box/step_3"} <= health.keys()
    assert health["reward/box"].isfinite()
    assert "reward/box/step_2" not in health


def test_a_runs_rewards_report_their_effective_share() -> None:
    joined, health = join(Linear(weights()), share=0.4)
    effective = rms(joined - advantage()) / rms(advantage())
    assert health["reward_share_effective"] == pytest.approx(effective.item())
    assert "reward_cosine/linear" in health


def test_exact_and_black_box_rewards_join_in_one_run_each_in_its_own_way() -> None:
    rewards = make_rewards(BlackBox(weights(), "first"), Linear(weights(), "second"))
    samples, statistics = make_samples(), RunningMeans()
    tilted, health = rewards.tilt(samples, PROMPTS, statistics)
    assert tilted.weight is not None and "reward/first" in health and "reward/second" not in health
    joined, health = rewards.join(advantage(), samples, PROMPTS, statistics)
    assert "reward/second" in health and "reward/first" not in health
    part = joined - advantage()
    assert torch.allclose(cosine(part, rewards.rewards[1].weights), torch.ones(COUNT))
    assert rms(part) == pytest.approx(0.1 * rms(advantage()).item(), rel=1e-4)  # half of the weights are the box's


def test_a_black_box_leaves_the_direction_as_it_is() -> None:
    joined, health = join(BlackBox(weights()))
    assert torch.equal(joined, advantage())
    assert health["reward_share_effective"] == 0
