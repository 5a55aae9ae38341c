"""External rewards: callables that score pictures, independent of diffusion."""

from .base import Reward, RewardError, WeightedReward, evaluate, reward_networks
from .functions import Function, Functions, functions_by_name, is_function, split_function, with_functions
from .registry import REWARDS, load_distinct_rewards, load_reward
from .user_file import NamedReward

__all__ = [
    "REWARDS", "Function", "Functions", "NamedReward", "Reward", "RewardError", "WeightedReward", "evaluate",
    "functions_by_name", "is_function", "load_distinct_rewards", "load_reward", "reward_networks", "split_function",
    "with_functions",
]  # fmt: skip
