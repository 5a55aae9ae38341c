"""The method as pure tensor functions; owns no optimiser, no device, no logging and no file."""

from .advantages import BIAS_ESTIMATORS, NORMALIZATIONS, fake_score_bias, grouped, leave_one_out_mean, normalizer
from .adversarial import density_ratio, discriminator_direction, student_pull
from .combination import COMBINATIONS, GNDMR
from .distribution_matching import RewardEstimate, estimate_reward
from .divergences import F_DIVERGENCES
from .draws import Draws
from .f_distill import FDistill
from .family import ALGORITHMS, MATCHINGS, THROUGH_NETWORKS, settings_of
from .importance import IMPORTANCE_WEIGHTINGS, importance_health, importance_weights, log_ratios, revisit
from .lcm import LCM
from .matching import Matching, Pull, ReverseKL, ascent
from .objectives import DMD, GNDM, Advantage, fake_score_direction
from .posterior import posterior_mean
from .renoising import FreshNoise, Renoised, Renoising
from .reward_gradients import Decode, RewardGradient, differentiable_gradients, reward_values
from .rollout import Place, Samples, Step, collect_samples, draw_samples, rollout, trained_places
from .sid import ScoreIdentity
from .sim import ScoreImplicit
from .snoopi import guidance_scales
from .statistics import RunningMeans
from .tdm import RENOISINGS, NextState, TrajectoryKL
from .tilting import standardised_advantage, tilted_weight
from .times import TIME_DISTRIBUTIONS, UNIFORM, TimeDistribution, denoising_times, guidance_times, renoising_times
from .uni_instruct import UniInstruct

__all__ = [
    "ALGORITHMS", "BIAS_ESTIMATORS", "COMBINATIONS", "DMD", "F_DIVERGENCES", "GNDM", "GNDMR", "IMPORTANCE_WEIGHTINGS",
    "LCM", "MATCHINGS", "NORMALIZATIONS", "RENOISINGS", "THROUGH_NETWORKS", "TIME_DISTRIBUTIONS", "UNIFORM",
    "Advantage", "Decode", "Draws", "FDistill", "FreshNoise", "Matching", "NextState", "Place", "Pull", "Renoised",
    "Renoising", "ReverseKL", "RewardEstimate", "RewardGradient", "RunningMeans", "Samples", "ScoreIdentity",
    "ScoreImplicit", "Step", "TimeDistribution", "TrajectoryKL", "UniInstruct", "ascent", "collect_samples",
    "denoising_times", "density_ratio", "differentiable_gradients", "discriminator_direction", "draw_samples",
    "estimate_reward", "fake_score_bias", "fake_score_direction", "grouped", "guidance_scales", "guidance_times",
    "importance_health", "importance_weights", "leave_one_out_mean", "log_ratios", "normalizer", "posterior_mean",
    "renoising_times", "revisit", "reward_values", "rollout", "settings_of", "standardised_advantage", "student_pull",
    "tilted_weight", "trained_places",
]  # fmt: skip
