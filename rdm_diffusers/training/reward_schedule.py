"""How strong external rewards are at each update: a warm-up, then constant or falling, in the shapes of diffusers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler

from ..config import RunConfig

SHAPES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}  # their names in diffusers


def reward_schedule(config: RunConfig) -> Callable[[int], float]:
    """What `--reward_share`, or the sum, and `--reward_tilt` are multiplied by at an update, counted from 0.

    It rises from 0 at update 0 to 1 after `--reward_warmup_steps`, and then stays, or falls to 0 at
    `--max_train_steps`. It depends on the update alone, so a resumed run goes on exactly.
    """
    shape = get_scheduler(
        SHAPES[config.rewards.reward_scheduler],
        torch.optim.SGD([torch.zeros(1)]),  # nothing moves; diffusers gives its shapes to optimisers alone
        num_warmup_steps=config.rewards.reward_warmup_steps,
        num_training_steps=config.optimisation.max_train_steps,
    )
    factor: Callable[[int], float] = shape.lr_lambdas[0]
    return lambda update: float(factor(update))
