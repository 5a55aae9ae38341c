"""External rewards: callables that score pictures, independent of diffusion."""

from .base import Reward, RewardError, WeightedReward, evaluate, reward_networks
from .registry import REWARDS, load_distinct_rewards, load_reward
from .user_file import NamedReward

__all__ = [
    "REWARDS", "NamedReward", "Reward", "RewardError", "WeightedReward", "evaluate", "load_distinct_rewards",
    "load_reward", "reward_networks",
]  # fmt: skip
