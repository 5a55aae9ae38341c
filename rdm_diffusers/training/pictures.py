"""Pictures of what the student is to learn, for updates that read them: the teacher's, or the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import RunConfig
from ..config.pictures import needs_pictures, reads_pictures
from ..distillation import Draws
from ..distillation.draws import sent
from ..families import Conditioning, Teacher
from .run import Distillation
from .target_buckets import images_of_sizes
from .target_images import TargetImages
from .user_images import UserImages


@dataclass(frozen=True)
class Pictures:
    """Pictures in the autoencoder's latents, with their prompts; one for each sample of an update.

    Args:
        images: of one size, those that the target learns, or that it would learn.
        draws: of the run, which choose among them.
    """

    images: TargetImages
    draws: Draws

    def batch(self, purpose: str, keys: Sequence[int]) -> tuple[Tensor, Conditioning]:
        """G pictures for each key, as there are G samples: latents `[len(keys) * G, C, H, W]`, float32, and prompts.

        Args:
            purpose: what they are drawn for; another purpose draws others.
            keys: of groups and steps (`Batch.keys`); a key has the same pictures in any batch and on any process.
        """
        chosen = self.images.chosen(self.draws.uniform(purpose, keys).cpu())
        latents = sent(self.images.latents[chosen], self.draws.device)
        return latents.to(torch.float32), self.images.conditioning(chosen)

    def prompts(self, purpose: str, keys: Sequence[int]) -> list[str]:
        """The prompt of each picture of `batch`."""
        chosen = self.images.chosen(self.draws.uniform(purpose, keys).cpu())
        return [self.images.prompts.text(number) for number in self.images.prompt_of[chosen].tolist()]


def images_of_run(
    images: UserImages | None, run: Distillation, teacher: Teacher, config: RunConfig, accelerator: Accelerator
) -> list[TargetImages]:
    """The images of each size that a run needs, for its target or its updates; arguments and errors as there."""
    return images_of_sizes(images, run, teacher, config, accelerator) if needs_pictures(config) else []


def with_pictures(run: Distillation, images: Sequence[TargetImages], config: RunConfig) -> Distillation:
    """The run with the pictures that its updates read, if they read any; each of its buckets has those of its size.

    Args:
        run: with its buckets.
        images: of each size.
        config: the run's.

    Raises:
        ValueError: if there are none of a size.
    """
    if not reads_pictures(config):
        return run
    of_size = {tuple(each.latents.shape[1:]): each for each in images}
    parts = run.buckets or (run,)
    if any(part.latent_shape not in of_size for part in parts):
        raise ValueError(
            "One of --aspect_ratio_buckets has none of your images, and updates read images of every size; leave that "
            "size out, or have the teacher draw some, too, with a --target_weight below 1."
        )
    found = [replace(part, pictures=Pictures(of_size[part.latent_shape], part.draws)) for part in parts]
    return replace(run, buckets=tuple(found)) if run.buckets else found[0]
