"""The Fréchet distance between two sets of features, through their means and covariances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean `[D]` and covariance `[D, D]` of features, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor, weights: Tensor | None = None) -> GaussianStatistics:
        """From features `[N, D]`, the covariance unbiased; samples may have weights `[N]`, above 0.

        Raises:
            ValueError: for fewer than two samples.
        """
        if len(features) < 2:
            raise ValueError("A covariance needs at least two samples; evaluate more images.")
        features = features.double()
        if weights is None:
            return cls(features.mean(0), torch.cov(features.T))
        shares = (weights.double() / weights.sum())[:, None]
        mean = (shares * features).sum(0)
        centred = features - mean
        return cls(mean, (shares * centred).T @ centred / (1 - shares.square().sum()))


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017); at least 0, 0 for equal statistics."""
    return FrechetReference(a).distance(b)


class FrechetReference:
    """Statistics to which many distances are measured; the root of their covariance is taken once.

    Args:
        statistics: the reference's.
    """

    def __init__(self, statistics: GaussianStatistics):
        self.statistics = statistics
        values, vectors = torch.linalg.eigh(statistics.covariance)
        self._root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def distance(self, other: GaussianStatistics) -> float:
        """`frechet_distance` between the reference and another."""
        a, b = self.statistics, other
        cross = torch.linalg.eigvalsh(self._root @ b.covariance @ self._root).clamp(min=0).sqrt().sum()
        spread = a.covariance.trace() + b.covariance.trace() - 2 * cross
        return max(0.0, ((a.mean - b.mean).square().sum() + spread).item())
