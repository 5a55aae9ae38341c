"""How many updates an epoch is, and how large a batch is that learning rates are scaled by."""

from __future__ import annotations

from ..config import RunConfig


def updates_of(config: RunConfig, prompts: int, num_processes: int) -> int:
    """How many updates `--num_train_epochs` are: the fewest in which every prompt has that many groups.

    Groups take the prompts in a new order each epoch, without a gap between epochs (`PromptGroups`). A rollout has
    `--train_batch_size x --gradient_accumulation_steps x num_processes / (--group_size x --steps_per_rollout)` groups,
    and serves `--reuse_rollouts` updates.

    Args:
        config: of a run that has a number of epochs.
        prompts: how many there are.
        num_processes: of the run.
    """
    method, epochs = config.method, config.optimisation.num_train_epochs or 0
    samples = config.optimisation.samples_per_update * num_processes
    groups = samples // (method.group_size * method.steps_per_rollout)
    return -(-epochs * prompts // groups) * method.reuse_rollouts


def with_updates(config: RunConfig, prompts: int, num_processes: int) -> RunConfig:
    """The configuration with the number of updates that its epochs are; unchanged if it has no number of epochs."""
    if config.optimisation.num_train_epochs is None:
        return config
    return config.changed("optimisation", max_train_steps=updates_of(config, prompts, num_processes))


def rate_factor(config: RunConfig, num_processes: int) -> int:
    """What `--scale_lr` multiplies the learning rates of student and fake score by; 1 without it.

    It is the number of samples whose mean is an update's gradient. The members of a group count one by one.
    """
    return config.optimisation.samples_per_update * num_processes if config.optimisation.scale_lr else 1
