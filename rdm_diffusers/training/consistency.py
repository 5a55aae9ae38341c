"""What consistency distillation trains on: noised pictures, each with what the student should predict there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distillation import LCM, Samples
from ..families import Conditioning
from ..prediction import expand
from .batches import Batch
from .run import Distillation

PURPOSE = "lcm_pictures"  # of their draws


@torch.no_grad()
def collect_noised(run: Distillation, number: int) -> Batch:
    """Noises pictures for the `number`-th time, and predicts there, and a step of the teacher's solver later.

    A sample counts as one of the student's step from which its noise is left, for names and health numbers. No
    gradients.
    """
    assert isinstance(run.objective, LCM) and run.pictures is not None
    keys, schedule = list(run.groups(number)), run.networks.schedule
    pictures, conditioning = run.pictures.batch(PURPOSE, keys)
    uniform, noise = run.draws.uniform("lcm_time", keys), run.draws.normal("lcm_noise", keys, run.latent_shape)
    t, earlier = run.objective.times(uniform, schedule, run.renoising_distribution.shift)
    x_t, x0, target = schedule.add_noise(pictures, noise, t), [], []
    for start in range(0, len(x_t), run.micro_batch_size):
        part = slice(start, start + run.micro_batch_size)
        x0.append(run.student(x_t[part], t[part], conditioning[part]))
        target.append(consistency_target(run, x_t[part], t[part], earlier[part], conditioning[part]))
    samples = Samples(x_t, t, torch.cat(x0), steps_of(run, t), conditioning)
    return Batch(samples, keys, run.pictures.prompts(PURPOSE, keys), target=torch.cat(target))


def consistency_target(
    run: Distillation, x_t: Tensor, t: Tensor, earlier: Tensor, conditioning: Conditioning
) -> Tensor:
    """What the student predicts where the teacher's solver arrives `[B, C, H, W]`; without noise, that place itself.

    Args:
        run: whose teacher, guided, or whose target takes the step.
        x_t, t, conditioning: the noisy samples.
        earlier: the times `[B]` to which the solver goes; below 0 it removes all noise.
    """
    teacher_x0 = run.networks.predict(run.networks.real_score, x_t, t, conditioning)
    arrived, _ = run.scheduler.transition(teacher_x0, x_t, t, earlier, eta=0.0)
    return torch.where(expand(earlier < 0, arrived), arrived, run.student(arrived, earlier.clamp(min=0), conditioning))


def steps_of(run: Distillation, t: Tensor) -> Tensor:
    """Of each time `[M]` the student's last step that is not below it, or else the first; on the CPU."""
    grid = run.scheduler.timesteps.cpu()
    return ((grid >= t.cpu()[:, None]).sum(1) - 1).clamp(min=0)
