"""The method as pure tensor functions; owns no optimiser, no device, no logging and no file."""

from .advantages import BIAS_ESTIMATORS, NORMALIZATIONS, fake_score_bias, leave_one_out_mean, normalizer
from .combination import COMBINATIONS, GNDMR
from .distribution_matching import RewardEstimate, estimate_reward, renoising_times
from .draws import Draws
from .importance import IMPORTANCE_WEIGHTINGS, importance_health, importance_weights, log_ratios, revisit
from .objectives import DMD, GNDM, JAMES_STEIN, Advantage, fake_score_direction
from .reward_gradients import (
    RewardGradient,
    differentiable_gradients,
    group_gradients,
    perturbation_gradients,
    reward_values,
)
from .rollout import Samples, Trajectory, executed_index, executed_samples, rollout
from .statistics import RunningMeans
from .tilting import standardised_advantage, tilted_weight

__all__ = [
    "BIAS_ESTIMATORS",
    "COMBINATIONS",
    "DMD",
    "GNDM",
    "GNDMR",
    "IMPORTANCE_WEIGHTINGS",
    "JAMES_STEIN",
    "NORMALIZATIONS",
    "Advantage",
    "Draws",
    "RewardEstimate",
    "RewardGradient",
    "RunningMeans",
    "Samples",
    "Trajectory",
    "differentiable_gradients",
    "estimate_reward",
    "executed_index",
    "executed_samples",
    "fake_score_bias",
    "fake_score_direction",
    "group_gradients",
    "importance_health",
    "importance_weights",
    "leave_one_out_mean",
    "log_ratios",
    "normalizer",
    "perturbation_gradients",
    "renoising_times",
    "revisit",
    "reward_values",
    "rollout",
    "standardised_advantage",
    "tilted_weight",
]
