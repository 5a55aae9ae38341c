"""The method as pure tensor functions; owns no optimiser, no device, no logging and no file."""

from .advantages import NORMALIZATIONS, fake_score_bias, leave_one_out_mean, normalizer
from .distribution_matching import RewardEstimate, estimate_reward, renoising_times
from .draws import Draws
from .objectives import DMD, GNDM, fake_score_direction
from .rollout import Samples, Trajectory, executed_samples, rollout

__all__ = [
    "DMD",
    "GNDM",
    "NORMALIZATIONS",
    "Draws",
    "RewardEstimate",
    "Samples",
    "Trajectory",
    "estimate_reward",
    "executed_samples",
    "fake_score_bias",
    "fake_score_direction",
    "leave_one_out_mean",
    "normalizer",
    "renoising_times",
    "rollout",
]
