"""Backward simulation, the choice of executed samples, and the keyed random numbers."""

from __future__ import annotations

import pytest
import torch
from parts import make_conditioning
from parts_float64 import ROUNDING
from torch import Tensor

from rdm_diffusers.distillation import Draws, Samples, Trajectory, executed_index, executed_samples, rollout
from rdm_diffusers.families import Conditioning
from rdm_diffusers.schedulers import RdmScheduler

GROUPS, GROUP, STEPS = 3, 2, 4
BATCH = GROUPS * GROUP


def known(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """A student of which everything is known."""
    offset = conditioning.tensors["prompt_embeds"].mean((1, 2)) + t / 1000
    return 0.5 * x_t + offset[:, None, None, None]


def four_steps(**options) -> RdmScheduler:
    scheduler = RdmScheduler(**options)
    scheduler.set_timesteps(STEPS)
    return scheduler


def noises() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(BATCH, 4, 8, 8, generator=generator) for _ in range(STEPS + 1)]


def executed(trajectory: Trajectory, steps: list[list[int]], conditioning: Conditioning) -> Samples:
    """The samples that are trained on where group i is at the steps `steps[i]`."""
    return executed_samples(trajectory, executed_index(steps, GROUP, "cpu"), conditioning)


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
@pytest.mark.usefixtures("float64")
def test_a_rollout_at_eta_one_predicts_and_renoises(prediction_type: str) -> None:
    scheduler, noise, conditioning = four_steps(prediction_type=prediction_type), noises(), make_conditioning(BATCH)
    trajectory = rollout(known, scheduler, noise, conditioning)
    x_t = noise[0]
    for k, t in enumerate(scheduler.timesteps):
        x0 = known(x_t, t.expand(BATCH), conditioning)
        assert torch.allclose(trajectory.x_t[k], x_t, atol=ROUNDING)
        assert torch.allclose(trajectory.x0[k], x0, atol=ROUNDING)
        assert trajectory.t[k] == t
        if k < STEPS - 1:
            x_t = scheduler.schedule.add_noise(x0, noise[k + 1], scheduler.timesteps[k + 1].expand(BATCH))
            assert torch.allclose(trajectory.next[k], x_t, atol=ROUNDING)
    assert torch.equal(trajectory.next[-1], trajectory.x0[-1])
    assert trajectory.std[-1] == 0


def test_a_rollout_states_the_distribution_that_it_drew_from() -> None:
    noise = noises()
    trajectory = rollout(known, four_steps(eta=0.5), noise, make_conditioning(BATCH))
    for k in range(STEPS - 1):
        drawn = trajectory.mean[k] + trajectory.std[k] * noise[k + 1]
        assert torch.equal(trajectory.next[k], drawn)
    assert trajectory.std[:-1].min() > 0


def test_a_deterministic_rollout_needs_no_noise_but_the_first() -> None:
    noise, conditioning = noises(), make_conditioning(BATCH)
    full = rollout(known, four_steps(eta=0.0), noise, conditioning)
    other = rollout(known, four_steps(eta=0.0), [noise[0], *noises()[1:][::-1]], conditioning)
    assert torch.equal(full.next, other.next)


@pytest.mark.usefixtures("float64")
def test_a_rollout_does_not_depend_on_its_micro_batches_and_may_stop_early() -> None:
    scheduler, noise, conditioning = four_steps(), noises(), make_conditioning(BATCH)
    whole = rollout(known, scheduler, noise, conditioning)
    pieces = rollout(known, scheduler, noise, conditioning, num_steps=2, micro_batch_size=4)
    assert pieces.x0.shape == (2, BATCH, 4, 8, 8)
    assert torch.allclose(pieces.x0, whole.x0[:2], atol=ROUNDING)
    assert torch.allclose(pieces.next, whole.next[:2], atol=ROUNDING)


def test_a_rollout_holds_no_gradients() -> None:
    weight = torch.ones(1, requires_grad=True)
    trajectory = rollout(lambda x_t, t, c: weight * x_t, four_steps(), noises(), make_conditioning(BATCH))
    assert not trajectory.x0.requires_grad
    assert not trajectory.next.requires_grad


def test_executed_samples_lie_group_after_group_and_step_after_step() -> None:
    conditioning = make_conditioning(BATCH)
    trajectory = rollout(known, four_steps(), noises(), conditioning)
    samples = executed(trajectory, [[0, 3], [1], [2, 3]], conditioning)
    layout = [(0, 0), (0, 1), (3, 0), (3, 1), (1, 2), (1, 3), (2, 4), (2, 5), (3, 4), (3, 5)]  # step, sample
    assert len(samples) == len(layout)
    for i, (k, b) in enumerate(layout):
        assert samples.step[i] == k
        assert samples.t[i] == trajectory.t[k]
        assert torch.equal(samples.x_t[i], trajectory.x_t[k, b])
        assert torch.equal(samples.x0[i], trajectory.x0[k, b])
        assert torch.equal(samples.conditioning.tensors["prompt_embeds"][i], conditioning.tensors["prompt_embeds"][b])


def test_micro_batches_cover_the_samples_in_order() -> None:
    conditioning = make_conditioning(BATCH)
    trajectory = rollout(known, four_steps(), noises(), conditioning)
    samples = executed(trajectory, [[0, 1], [1, 2], [2, 3]], conditioning)
    parts = [samples[part] for part in samples.micro_batches(5)]
    assert [len(part) for part in parts] == [5, 5, 2]
    assert torch.equal(torch.cat([part.x0 for part in parts]), samples.x0)


def test_a_groups_numbers_do_not_depend_on_the_batch_of_groups() -> None:
    draws = Draws(seed=0, group_size=GROUP)
    normal, uniform = draws.normal("noise", [3, 7, 11], (4, 8, 8)), draws.uniform("tau", [3, 7, 11])
    assert normal.shape == (6, 4, 8, 8)
    assert torch.equal(draws.normal("noise", [7], (4, 8, 8)), normal[2:4])
    assert torch.equal(draws.uniform("tau", [11, 3]), torch.cat([uniform[4:], uniform[:2]]))


def test_different_purposes_groups_seeds_and_members_have_different_numbers() -> None:
    draws = Draws(seed=0, group_size=GROUP)
    numbers = [
        draws.normal("noise", [3], (8,)),
        draws.normal("tau_noise", [3], (8,)),
        draws.normal("noise", [4], (8,)),
        Draws(seed=1, group_size=GROUP).normal("noise", [3], (8,)),
    ]
    rows = torch.cat(numbers)
    assert torch.cdist(rows, rows).fill_diagonal_(torch.inf).min() > 0.1


def test_drawing_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    draws = Draws(seed=0, group_size=GROUP)
    draws.normal("noise", [1], (8,))
    draws.uniform("tau", [1])
    draws.subset("steps", 1, 2, of=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_have_the_distribution_that_they_should() -> None:
    draws = Draws(seed=0, group_size=50)
    normal, uniform = draws.normal("noise", range(100), (10,)), draws.uniform("tau", range(200))
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    assert 0 <= uniform.min() < 0.001
    assert 0.999 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02


def test_a_subset_is_ascending_distinct_and_chooses_everything_alike() -> None:
    draws, counts = Draws(seed=0, group_size=GROUP), torch.zeros(4)
    for group in range(600):
        chosen = draws.subset("steps", group, 2, of=4)
        assert chosen == sorted(set(chosen))
        assert len(chosen) == 2
        counts[chosen] += 1
    assert counts.min() > 250
    assert draws.subset("steps", 5, 4, of=4) == [0, 1, 2, 3]
