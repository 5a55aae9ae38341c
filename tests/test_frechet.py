"""The Fréchet distance is scipy's formula, and nothing for equal statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rdm_diffusers.frechet import GaussianStatistics, frechet_distance


def features(seed: int, count: int = 500, dimensions: int = 16) -> Tensor:
    """Correlated features `[N, D]` with a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimensions, dimensions, generator=generator)
    return torch.randn(count, dimensions, generator=generator) @ mix + torch.randn(dimensions, generator=generator)


def by_scipy(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """The distance as it is usually computed."""
    linalg = pytest.importorskip("scipy.linalg")
    root = torch.tensor(linalg.sqrtm((a.covariance @ b.covariance).numpy()).real)
    return float((a.mean - b.mean).square().sum() + (a.covariance + b.covariance - 2 * root).trace())


def test_it_is_scipys_formula() -> None:
    a, b = GaussianStatistics.of(features(0)), GaussianStatistics.of(features(1))
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-6)


def test_it_is_symmetric() -> None:
    a, b = GaussianStatistics.of(features(0)), GaussianStatistics.of(features(1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-8)


@pytest.mark.parametrize("count", [500, 8])  # 8: a singular covariance
def test_it_is_nothing_for_equal_statistics_and_never_negative(count: int) -> None:
    a = GaussianStatistics.of(features(0, count))
    assert 0 <= frechet_distance(a, a) < 1e-4


def test_it_is_the_squared_distance_of_the_means_where_the_covariances_agree() -> None:
    a = features(0)
    shifted = a + torch.arange(16) / 16
    expected = float((torch.arange(16) / 16).square().sum())
    assert frechet_distance(GaussianStatistics.of(a), GaussianStatistics.of(shifted)) == pytest.approx(expected, 1e-4)


def test_statistics_are_the_mean_and_the_unbiased_covariance() -> None:
    a = features(0)
    statistics = GaussianStatistics.of(a)
    centred = a.double() - a.double().mean(0)
    assert torch.allclose(statistics.mean, a.double().mean(0))
    assert torch.allclose(statistics.covariance, centred.T @ centred / (len(a) - 1))


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="A covariance needs at least two samples; evaluate more images"):
        GaussianStatistics.of(torch.randn(1, 16))
