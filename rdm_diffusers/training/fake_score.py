"""What the fake score's network has beside the teacher's: the student's steps, and a discriminator on its features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..config import RunConfig
from ..config.discriminator import has_discriminator
from ..families import Family
from ..networks import FAKE_SCORE, Networks, SeparateNetworks


def add_to_fake_score(networks: Networks, family: Family, config: RunConfig, latents: tuple[int, int, int]) -> None:
    """Adds what the run asks for; the networks are on their device.

    Args:
        networks: changed in place.
        family: the teacher's.
        config: the run's; its seed decides the discriminator's first weights.
        latents: `(C, H, W)`.
    """
    if not (config.method.fake_score_steps or has_discriminator(config)):
        return
    network: Any = networks.denoisers[FAKE_SCORE] if isinstance(networks, SeparateNetworks) else networks.modules[0]
    if config.method.fake_score_steps:
        networks.add_step_embedding(network.get_submodule(family.time_embedding_name), config.method.num_student_steps)
    if has_discriminator(config):
        device = network.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.optimisation.seed)
            x_t, t = torch.zeros(1, *latents, device=device), torch.full((1,), 500, device=device)
            networks.add_discriminator(family.middle_block(network), x_t, t)


def discriminator_size(networks: Networks, states: Callable[[int], int]) -> int:
    """Bytes of the discriminator, if there is one, and of its optimiser: `states` gives those of so many weights."""
    parameters = [] if networks.discriminator is None else list(networks.discriminator.parameters())
    return sum(parameter.nbytes + states(parameter.numel()) for parameter in parameters)
