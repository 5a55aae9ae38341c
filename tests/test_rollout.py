"""Backward simulation, the states that are trained on, and the keyed random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
import torch
from parts import make_conditioning
from parts_float64 import ROUNDING
from torch import Tensor

from rdm_diffusers.distillation import Draws, Samples, Step, collect_samples, draw_samples, rollout, trained_places
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
    return [torch.randn(BATCH, 4, 8, 8, generator=generator) for _ in range(STEPS)]


def steps_of(scheduler: RdmScheduler, noise: Iterable[Tensor] | None = None, **options) -> list[Step]:
    """A whole rollout of the known student."""
    return list(rollout(known, scheduler, noises() if noise is None else noise, make_conditioning(BATCH), **options))


def collected(rollout: list[Step], steps: list[list[int]]) -> Samples:
    """The samples that are trained on where group i is at the steps `steps[i]`."""
    return collect_samples(rollout, trained_places(steps, GROUP), make_conditioning(BATCH))


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
@pytest.mark.usefixtures("float64")
def test_a_rollout_at_eta_one_predicts_and_renoises(prediction_type: str) -> None:
    scheduler, noise, conditioning = four_steps(prediction_type=prediction_type), noises(), make_conditioning(BATCH)
    x_t = noise[0]
    for k, (step, t) in enumerate(zip(steps_of(scheduler, noise), scheduler.timesteps, strict=True)):
        x0 = known(x_t, t.expand(BATCH), conditioning)
        assert torch.allclose(step.x_t, x_t, atol=ROUNDING)
        assert torch.allclose(step.x0, x0, atol=ROUNDING)
        assert (step.k, step.t) == (k, t)
        if k < STEPS - 1:
            x_t = scheduler.schedule.add_noise(x0, noise[k + 1], scheduler.timesteps[k + 1].expand(BATCH))
    assert torch.equal(step.mean, step.x0)
    assert step.std == 0
    assert torch.equal(draw_samples(known, scheduler, noise, conditioning), step.x0)


def test_a_rollout_states_the_distribution_that_it_drew_from() -> None:
    noise = noises()
    steps = steps_of(four_steps(eta=0.5), noise)
    for step, following in pairwise(steps):
        assert torch.equal(following.x_t, step.mean + step.std * noise[following.k])
        assert step.std > 0


def test_noise_is_drawn_when_it_is_needed_and_none_after_the_last_step() -> None:
    drawn = []

    def drawing() -> Iterator[Tensor]:
        for k, noise in enumerate(noises()):
            drawn.append(k)
            yield noise

    for step in rollout(known, four_steps(), drawing(), make_conditioning(BATCH)):
        assert drawn == list(range(step.k + 1))
    assert drawn == [0, 1, 2, 3]
    drawn.clear()
    assert len(steps_of(four_steps(), drawing(), num_steps=2)) == 2
    assert drawn == [0, 1]


def test_a_deterministic_rollout_needs_no_noise_but_the_first() -> None:
    assert len(steps_of(four_steps(eta=0.0), noises()[:1])) == STEPS


@pytest.mark.usefixtures("float64")
def test_a_rollout_does_not_depend_on_its_micro_batches_and_may_stop_early() -> None:
    whole, pieces = steps_of(four_steps()), steps_of(four_steps(), num_steps=2, micro_batch_size=4)
    assert len(pieces) == 2
    for piece, step in zip(pieces, whole, strict=False):
        for name in ("x_t", "x0", "mean"):
            assert torch.allclose(getattr(piece, name), getattr(step, name), atol=ROUNDING)


def test_a_rollout_holds_no_gradients() -> None:
    weight = torch.ones(1, requires_grad=True)
    for step in rollout(lambda x_t, t, c: weight * x_t, four_steps(), noises(), make_conditioning(BATCH)):
        assert torch.is_grad_enabled()  # outside of the rollout
        assert not any(tensor.requires_grad for tensor in (step.x_t, step.x0, step.mean))


def test_samples_lie_group_after_group_and_step_after_step() -> None:
    conditioning, steps = make_conditioning(BATCH), steps_of(four_steps())
    samples = collected(steps, [[0, 3], [1], [2, 3]])
    layout = [(0, 0), (0, 1), (3, 0), (3, 1), (1, 2), (1, 3), (2, 4), (2, 5), (3, 4), (3, 5)]  # step, sample
    assert len(samples) == len(layout)
    for i, (k, b) in enumerate(layout):
        assert samples.step[i] == k
        assert samples.t[i] == steps[k].t
        assert torch.equal(samples.x_t[i], steps[k].x_t[b])
        assert torch.equal(samples.x0[i], steps[k].x0[b])
        assert torch.equal(samples.conditioning.tensors["prompt_embeds"][i], conditioning.tensors["prompt_embeds"][b])


def test_micro_batches_cover_the_samples_in_order() -> None:
    samples = collected(steps_of(four_steps()), [[0, 1], [1, 2], [2, 3]])
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
