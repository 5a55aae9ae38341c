"""What the members of the family differ in: how teacher and fake score become a pull on the student's prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..networks import FAKE_SCORE, Networks
from ..prediction import expand
from .distribution_matching import RewardEstimate
from .rollout import Samples


@dataclass(frozen=True)
class Pull:
    """Minus the partial derivatives of a member's loss, sample by sample; everything float32 and detached.

    Args:
        x0: with respect to x̂ itself `[M, C, H, W]`, while the networks' outputs stay as they are.
        teacher_x0: with respect to the teacher's x0 at the re-noised x̂, same shape; None where the loss holds it still.
        fake_x0: the same for the fake score's.
        logit: with respect to the discriminator's logit there `[M]`.
    """

    x0: Tensor
    teacher_x0: Tensor | None = None
    fake_x0: Tensor | None = None
    logit: Tensor | None = None

    def __truediv__(self, n: Tensor) -> Pull:
        """Each sample's pull over its n `[M]`."""

        def divided(part: Tensor | None) -> Tensor | None:
            return None if part is None else part / expand(n, part)

        x0 = self.x0 / expand(n, self.x0)
        return Pull(x0, *(divided(part) for part in (self.teacher_x0, self.fake_x0, self.logit)))


class Matching(Protocol):
    """A member of the family."""

    def pull(self, estimate: RewardEstimate) -> Pull:
        """Where x̂, and what the networks make of it, should go. No gradients.

        Args:
            estimate: of M samples; GNDM's correction, if it is on, has been taken from `fake_x0`.
        """


@dataclass(frozen=True)
class ReverseKL:
    """KL(student || teacher), whose gradient holds both scores still: R_dm = teacher x0 - fake x0 (DMD, DMD2, GNDM)."""

    def pull(self, estimate: RewardEstimate) -> Pull:
        return Pull(estimate.reward)


def ascent(
    networks: Networks, samples: Samples, estimate: RewardEstimate, pull: Pull, micro_batch_size: int | None = None
) -> Tensor:
    """Where x̂ should go `[M, C, H, W]`: its own pull, and those on the networks' outputs, pulled back to it.

    A pull v on an output f(x_tau) moves x̂ by dx_tau/dx̂ J^T v, J the network's Jacobian; with x_tau = a x̂ + s eps by
    a J^T v. Each of the two costs a forward and a backward of every sample. Detached.

    Args:
        networks: the roles.
        samples: M samples.
        estimate: of the samples, by `estimate_reward`.
        pull: on them.
        micro_batch_size: how many samples go through a network at once; all by default.

    Raises:
        ValueError: if a pull goes through a network, and the estimate lacks `x_tau` or `time`.
    """
    found, x_tau, time = pull.x0, estimate.x_tau, estimate.time
    pulls = ((networks.real_score, pull.teacher_x0, None), (FAKE_SCORE, pull.fake_x0, pull.logit))
    for role, cotangent, logit in pulls:
        if cotangent is None and logit is None:
            continue
        if x_tau is None or time is None:
            raise ValueError("A pull through a network needs an estimate with x_tau and its times.")
        scale, parts = estimate.guidance_scale, list[Tensor]()
        for part in samples.micro_batches(micro_batch_size or len(samples)):
            inputs = x_tau[part], time[part], samples.conditioning[part]
            given = (None if each is None else each[part] for each in (cotangent, samples.step, logit, scale))
            parts.append(networks.pull_back(role, *inputs, *given))
        found = found + expand(estimate.slope, found) * torch.cat(parts)
    return found
