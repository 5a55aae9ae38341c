"""The target regresses on the mean of the images that a noisy one may come from."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from rdm_diffusers.distillation import posterior_mean
from rdm_diffusers.training import target_images
from rdm_diffusers.training.target_images import HELD_OUT, TargetImages


def few_images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 2, 3, generator=generator), torch.tensor(
        [[True] * 4, [True, True, False, False], [True] * 4]
    )


def test_it_is_what_bayes_rule_gives() -> None:
    images, present = few_images()
    x_t, alpha, sigma = torch.randn(3, 2, 3), torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.5, 0.8, 1.0])
    found = posterior_mean(x_t, alpha, sigma, images, present)
    for b in range(3):
        densities = [
            math.prod(
                math.exp(-((x - alpha[b] * m) ** 2) / (2 * sigma[b] ** 2))
                for x, m in zip(x_t[b].flatten(), image, strict=True)
            )
            for image in images[b][present[b]].flatten(1)
        ]
        expected = sum(p * image for p, image in zip(densities, images[b][present[b]], strict=True)) / sum(densities)
        assert torch.allclose(found[b], expected, atol=1e-5)


def test_a_regression_on_it_has_the_same_gradient_on_average_and_less_variance() -> None:
    images, _ = few_images()
    generator, count, alpha, sigma = torch.Generator().manual_seed(1), 200_000, 0.3, 0.95
    choice = torch.randint(4, (count,), generator=generator)
    x0 = images[0][choice]
    x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
    same = images[:1].expand(count, -1, -1, -1)
    mean = posterior_mean(x_t, torch.full((count,), alpha), torch.full((count,), sigma), same, torch.ones(count, 4) > 0)
    plain, less = (torch.einsum("bij,bij->b", x_t, x_t - target) for target in (x0, mean))  # of the network a * x_t
    assert abs(plain.mean() - less.mean()) < 4 * plain.std() / count**0.5
    assert less.var() < 0.9 * plain.var()


def test_without_noise_it_is_the_image_itself() -> None:
    images, present = few_images()
    found = posterior_mean(images[:, 1], torch.ones(3), torch.full((3,), 1e-3), images, present)
    assert torch.equal(found, images[:, 1])


def made(prompt_of: list[int], *sources: range) -> TargetImages:
    parts = tuple((1 / len(sources), torch.tensor(numbers)[:, None]) for numbers in sources)
    latents = torch.arange(len(prompt_of)).float().reshape(-1, 1, 1, 1)
    return TargetImages(None, latents, SimpleNamespace(), torch.tensor(prompt_of), parts)


def test_alike_are_the_images_of_a_prompt_and_a_source_but_for_those_held_out() -> None:
    images = made([0, 1] * 20 + [0, 1], range(0, 20), range(20, 42))
    candidates, present = images.alike(torch.tensor([0, 1, 41]))
    found = [set(row[there].tolist()) for row, there in zip(candidates, present, strict=True)]
    assert HELD_OUT == 20
    assert found == [set(range(0, 20, 2)), set(range(1, 18, 2)), set(range(21, 42, 2)) - {39}]


def test_of_many_images_of_a_prompt_each_is_alike_to_a_part_that_has_it(monkeypatch) -> None:
    monkeypatch.setattr(target_images, "MOST_ALIKE", 4)
    images = made([0] * 18, range(18))
    candidates, present = images.alike(torch.arange(18))
    assert candidates.shape == (18, 4)
    assert all(i in row[there].tolist() for i, (row, there) in enumerate(zip(candidates, present, strict=True)))
