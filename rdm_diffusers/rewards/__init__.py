"""External rewards: callables that score pictures, independent of diffusion."""

from .base import Reward, RewardError, WeightedReward, evaluate
from .registry import REWARDS, load_distinct_rewards, load_reward

__all__ = ["REWARDS", "Reward", "RewardError", "WeightedReward", "evaluate", "load_distinct_rewards", "load_reward"]
