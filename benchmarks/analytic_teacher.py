"""A teacher whose score is known exactly: a class-conditional mixture of Gaussians fitted to handwritten digits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rdm_diffusers.prediction import NoiseSchedule, expand, from_x0

CLASSES, DIMENSIONS, COMPONENTS = 10, 16, 3
SHAPE = (1, 1, DIMENSIONS)  # a point, as a latent


@dataclass(frozen=True)
class Mixture:
    """Equal classes of Gaussians with full covariances; noised to any time it is a mixture again.

    Args:
        log_weights: `[J]`, of each component.
        members: `[J, classes]`, 1 where a component belongs to a class.
        means: `[J, D]`.
        axes, variances: the covariances' eigenvectors `[J, D, D]` (columns) and eigenvalues `[J, D]`.
    """

    log_weights: Tensor
    members: Tensor
    means: Tensor
    axes: Tensor
    variances: Tensor

    def posterior_mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """E[x0 | x_t, class] at points `[B, D]`, in their dtype.

        Args:
            x_t: `[B, D]`.
            alpha, sigma: `[B]`.
            classes: one-hot `[B, classes]`; a row of zeros means any class.
        """
        alpha, noise = alpha[:, None, None], sigma[:, None, None] ** 2
        offset = torch.einsum("bd,jde->bje", x_t, self.axes) - alpha * torch.einsum("jd,jde->je", self.means, self.axes)
        variance = alpha**2 * self.variances + noise
        log_density = self.log_weights - 0.5 * (offset**2 / variance + variance.log()).sum(2)
        allowed = classes @ self.members.T + (1 - classes.sum(1, keepdim=True)) > 0
        weights = log_density.masked_fill(~allowed, -math.inf).softmax(1)
        shrunk = weights[..., None] * alpha * self.variances / variance * offset
        return weights @ self.means + torch.einsum("bje,jde->bd", shrunk, self.axes)

    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Clean points `[B, D]` of the classes `[B]`."""
        weights = (self.log_weights.exp()[:, None] * self.members).T[labels]
        j = torch.multinomial(weights, 1, generator=generator)[:, 0]
        along = self.variances[j].sqrt() * torch.randn(len(j), self.means.shape[1], generator=generator)
        return self.means[j] + (self.axes[j] @ along[..., None])[..., 0]


def fit_mixture() -> dict[str, Tensor]:
    """`Mixture`'s tensors, float64: principal components of the digits at mean variance 1, a few Gaussians a class."""
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    images, labels = load_digits(return_X_y=True)
    points = PCA(DIMENSIONS, random_state=0).fit_transform(images)
    points /= math.sqrt(points.var(0).mean())
    fits = [
        GaussianMixture(COMPONENTS, reg_covar=1e-2, random_state=0).fit(points[labels == c]) for c in range(CLASSES)
    ]
    values, axes = torch.linalg.eigh(torch.cat([torch.from_numpy(fit.covariances_) for fit in fits]))
    return {
        "log_weights": torch.cat([torch.from_numpy(fit.weights_) for fit in fits]).log(),
        "members": torch.eye(CLASSES, dtype=torch.float64).repeat_interleave(COMPONENTS, 0),
        "means": torch.cat([torch.from_numpy(fit.means_) for fit in fits]),
        "axes": axes.contiguous(),
        "variances": values,
    }


class ExactDenoiser(nn.Module):
    """The mixture's posterior mean as an output of the given type, called as a U-Net is."""

    def __init__(self, mixture: Mixture, schedule: NoiseSchedule, prediction_type: str):
        super().__init__()
        self.mixture, self.schedule, self.prediction_type = mixture, schedule, prediction_type

    def forward(self, x_t: Tensor, t: Tensor, classes: Tensor, return_dict: bool) -> tuple[Tensor]:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x0 = self.mixture.posterior_mean(x_t.flatten(1), alpha, sigma, classes).view_as(x_t)
        return (from_x0(self.prediction_type, x0, x_t, expand(alpha, x_t), expand(sigma, x_t)),)


class LearnedDenoiser(nn.Module):
    """A small conditional perceptron, called as a U-Net is."""

    def __init__(self, schedule: NoiseSchedule, width: int):
        super().__init__()
        self.schedule = schedule
        self.body = nn.Sequential(
            nn.Linear(DIMENSIONS + CLASSES + 9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, DIMENSIONS),
        )  # fmt: skip

    def forward(self, x_t: Tensor, t: Tensor, classes: Tensor, return_dict: bool) -> tuple[Tensor]:
        phase = (t / self.schedule.num_train_timesteps)[:, None]
        waves = math.pi * phase * torch.tensor([1.0, 2.0, 4.0])
        scales = torch.stack([self.schedule.alpha(t), self.schedule.sigma(t)], 1)
        features = [x_t.flatten(1), classes, phase, scales, waves.sin(), waves.cos()]
        return (self.body(torch.cat(features, 1)).view_as(x_t),)
