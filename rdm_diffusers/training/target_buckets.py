"""What the target learns from where a run has aspect-ratio buckets: images of every size."""

from __future__ import annotations

import warnings
from dataclasses import replace

from accelerate import Accelerator
from diffusers.training_utils import find_nearest_bucket

from ..config import RunConfig
from ..families import Teacher
from ..sizes import Resolution, height_and_width
from .run import Distillation
from .target_images import HELD_OUT, TargetImages, draw_target_images
from .user_images import UserImages, user_target_images


def images_of_sizes(
    images: UserImages | None, run: Distillation, teacher: Teacher, config: RunConfig, accelerator: Accelerator
) -> list[TargetImages]:
    """The images of each size. The teacher draws equally many of each; of the user's each has the nearest shape.

    Args:
        images: the user's; None if there are none.
        run: with its buckets.
        teacher: draws, and encodes.
        config: the run's.
        accelerator: of the run.

    Raises:
        ValueError, OSError: as `draw_target_images` and `user_target_images` do.
    """
    if not run.buckets:
        whole = (run, teacher, config, accelerator)
        return [draw_target_images(*whole) if images is None else user_target_images(images, *whole)]
    sizes = config.teacher.sizes
    own: list[list[int]] = [[] for _ in sizes] if images is None else nearest_buckets(images, config)
    found = []
    for i, (size, bucket) in enumerate(zip(sizes, run.buckets, strict=True)):
        numbers, weight, share = _part(config, len(own[i]), sum(map(len, own)), i)
        at_size = config.changed("teacher", resolution=size).changed("target", target_weight=weight)
        if images is not None and own[i]:
            made = user_target_images(images, bucket, teacher, at_size, accelerator, own[i], numbers)
        else:
            made = draw_target_images(bucket, teacher, at_size, accelerator, numbers)
        found.append(replace(made, share=share))
    return [each for each in found if each.share]


def _part(config: RunConfig, own: int, of: int, place: int) -> tuple[range, float, float]:
    """Of the size at this place: the teacher's images, the weight of the user's beside them, and the size's share.

    Args:
        config: the run's.
        own: how many of the user's images have this size.
        of: how many images the user has; 0 if none are learnt.
        place: among the sizes.
    """
    count, weight = config.target.num_target_images, config.target.target_weight if of else 0.0
    numbers = range(place, count, len(config.teacher.sizes)) if weight < 1 else range(0)
    users, teachers = weight * own / max(of, 1), (1 - weight) * len(numbers) / count
    share = users + teachers
    return numbers, users / share if share else 0.0, share


def nearest_buckets(images: UserImages, config: RunConfig) -> list[list[int]]:
    """The images of each size: those to whose shape none is nearer, as diffusers' `find_nearest_bucket` says."""
    buckets = [height_and_width(size) for size in config.teacher.sizes if size is not None]
    places = [find_nearest_bucket(*size, buckets) for size in images.sizes]
    return [[index for index, place in enumerate(places) if place == i] for i in range(len(buckets))]


def check_images_of_sizes(images: UserImages, config: RunConfig) -> None:
    """Warns of sizes that no image is near to; ValueError if none of the sizes has images enough to hold one out.

    With `--target_weight` below 1 every size has images of the teacher.
    """
    if len(config.teacher.sizes) == 1 or config.target.target_weight < 1:
        return
    counts: dict[Resolution | None, int] = dict(
        zip(config.teacher.sizes, map(len, nearest_buckets(images, config)), strict=True)
    )
    if max(counts.values()) < HELD_OUT:
        raise ValueError(
            f"The most images that one of --aspect_ratio_buckets has are {max(counts.values())}; the target needs "
            f"{HELD_OUT} of one size at least, so give more images or fewer buckets."
        )
    empty = [str(size) for size, number in counts.items() if not number]
    if empty:
        warnings.warn(
            f"No image is nearest in shape to {', '.join(empty)}, so that the target learns nothing of these sizes.",
            stacklevel=2,
        )
