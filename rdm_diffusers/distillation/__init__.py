"""The method as pure tensor functions; owns no optimiser, no device, no logging and no file."""

from .advantages import BIAS_ESTIMATORS, NORMALIZATIONS, fake_score_bias, grouped, leave_one_out_mean, normalizer
from .combination import COMBINATIONS, GNDMR
from .distribution_matching import RewardEstimate, estimate_reward
from .draws import Draws
from .family import ALGORITHMS, MATCHINGS, settings_of
from .importance import IMPORTANCE_WEIGHTINGS, importance_health, importance_weights, log_ratios, revisit
from .lcm import LCM
from .matching import Matching, Pull, ReverseKL, ascent
from .objectives import DMD, GNDM, Advantage, fake_score_direction
from .posterior import posterior_mean
from .reward_gradients import Decode, RewardGradient, differentiable_gradients, reward_values
from .rollout import Place, Samples, Step, collect_samples, draw_samples, rollout, trained_places
from .statistics import RunningMeans
from .tilting import standardised_advantage, tilted_weight
from .times import TIME_DISTRIBUTIONS, UNIFORM, TimeDistribution, guidance_times, renoising_times

__all__ = [
    "ALGORITHMS", "BIAS_ESTIMATORS", "COMBINATIONS", "DMD", "GNDM", "GNDMR", "IMPORTANCE_WEIGHTINGS", "LCM",
    "MATCHINGS", "NORMALIZATIONS", "TIME_DISTRIBUTIONS", "UNIFORM", "Advantage", "Decode", "Draws", "Matching",
    "Place", "Pull", "ReverseKL", "RewardEstimate", "RewardGradient", "RunningMeans", "Samples", "Step",
    "TimeDistribution", "ascent", "collect_samples", "differentiable_gradients", "draw_samples", "estimate_reward",
    "fake_score_bias", "fake_score_direction", "grouped", "guidance_times", "importance_health", "importance_weights",
    "leave_one_out_mean", "log_ratios", "normalizer", "posterior_mean", "renoising_times", "revisit", "reward_values",
    "rollout", "settings_of", "standardised_advantage", "tilted_weight", "trained_places",
]  # fmt: skip
