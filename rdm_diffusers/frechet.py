"""The Fréchet distance between two sets of features, through their means and covariances, with its confidence interval.

The distance of N pictures is too large by about b / N (arXiv 1911.07023), and it scatters. A bootstrap does not remove
the first error, because pictures drawn twice look like fewer pictures. The grouped jackknife (Quenouille 1956, Tukey
1958) estimates both. The pictures are assigned at random to G groups, and d_g is the distance d without group g. Then,
with f = 1 - 1 / G, d - f sum(d_g - d) is the distance without b / N, and f sum(d_g - mean d_g)^2 is the square of its
standard error.

Where prompts have several pictures each, the sample is balanced, and leaving pictures out at random would unbalance it.
So a prompt's pictures are assigned to different groups, those that remain take over the weight of those left out, and
f = 1 - 1 / min(pictures of a prompt, G): the stratified jackknife. The interval is then for other seeds; where every
prompt has one picture, it is for other seeds and other prompts of the kind.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

GROUPS = 20
STUDENT_T = 2.093  # 97.5% quantile of Student's t with 19 degrees of freedom
CONFIDENCE = 0.95
ENOUGH = 10  # pictures for each feature dimension


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
    """Statistics to which many distances are measured; the root of their covariance is taken once."""

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


@dataclass(frozen=True)
class Distance:
    """A Fréchet distance with its error; the reference's own error is not included.

    Args:
        value: of these pictures, as other programs compute it.
        low, high: the 95% interval of what as many pictures give on average; None for fewer than 40.
        standard_error: of `value`.
        extrapolated: the estimated distance of infinitely many pictures; it scatters as `value` does. None for fewer
            than 10 D pictures.
        num_images, dimensions: N and D.
        warning: a sentence if N is less than 10 D.
    """

    value: float
    low: float | None
    high: float | None
    standard_error: float | None
    extrapolated: float | None
    num_images: int
    dimensions: int
    warning: str | None = None
    confidence: float = CONFIDENCE
    method: str = f"jackknife over {GROUPS} groups, stratified by prompt"

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def distance_with_interval(features: Tensor, reference: GaussianStatistics, num_prompts: int | None = None) -> Distance:
    """The Fréchet distance of features to a reference, with its interval.

    Args:
        features: `[N, D]`; picture i was drawn for prompt i modulo `num_prompts`.
        reference: statistics of the same features.
        num_prompts: how many different prompts there are, which may exceed N; None if unknown.

    Raises:
        ValueError: for fewer than two pictures, or features of another dimension than the reference's.
    """
    count, dimensions = features.shape
    if len(reference.mean) != dimensions:
        raise ValueError(
            f"The reference has {len(reference.mean)} features and the pictures have {dimensions}; give a reference "
            "made with the same features."
        )
    target, warning = FrechetReference(reference), None
    if count < ENOUGH * dimensions:
        warning = (
            f"{count:,} images are few for {dimensions:,} features: the distance is too large, and to be compared only "
            f"with others of as many images; draw {ENOUGH * dimensions:,} or more."
        )
    value = target.distance(GaussianStatistics.of(features))
    if count < 2 * GROUPS:
        return Distance(value, None, None, None, None, count, dimensions, warning)
    unbiased, error = _jackknife(features, value, target, num_prompts or count)
    extrapolated = None if warning else max(0.0, unbiased)
    low, high = max(0.0, value - STUDENT_T * error), value + STUDENT_T * error
    return Distance(value, low, high, error, extrapolated, count, dimensions, warning)


def _jackknife(features: Tensor, value: float, target: FrechetReference, num_prompts: int) -> tuple[float, float]:
    """The distance of infinitely many pictures, and the standard error of `value`, the distance of these."""
    each = max(1, len(features) // num_prompts)
    strata = torch.arange(len(features)) % num_prompts if each > 1 else torch.zeros(len(features), dtype=torch.long)
    distances = []
    for weights in weights_without_each_group(strata):
        kept = weights > 0
        distances.append(target.distance(GaussianStatistics.of(features[kept], weights[kept])))
    without = torch.tensor(distances, dtype=torch.float64)
    factor = 1 - 1 / (min(each, GROUPS) if each > 1 else GROUPS)
    unbiased = value - factor * (without - value).sum()
    return unbiased.item(), (factor * (without - without.mean()).square().sum()).sqrt().item()


def weights_without_each_group(strata: Tensor) -> list[Tensor]:
    """For each group the weights `[N]` of all pictures without it: 0 in the group, and every stratum keeps its total.

    `strata` `[N]` counts the strata from 0; each has at least two pictures.
    """
    order = torch.randperm(len(strata), generator=torch.Generator().manual_seed(0))
    order = order[strata[order].argsort(stable=True)]
    group = torch.empty_like(strata)
    group[order] = torch.arange(len(strata)) % GROUPS
    total = torch.bincount(strata).double()
    weights = []
    for g in range(GROUPS):
        kept = (group != g).double()
        left = torch.zeros_like(total).index_add(0, strata, kept)
        weights.append(kept * (total / left)[strata])
    return weights
