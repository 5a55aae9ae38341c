"""Which runs have a discriminator on the fake score's features, and what goes with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..sharding import is_sharded_launch

if TYPE_CHECKING:
    from .run_config import RunConfig

OF_RATIO = ("f_distill", "uni_instruct")  # the algorithms that read the density ratio
USUAL_WEIGHT = 1e-2  # of the discriminator's loss, DMD2's


def has_discriminator(config: RunConfig) -> bool:
    """Whether the fake score has a discriminator: for the adversarial branch, or for the density ratio."""
    return config.method.gen_cls_loss_weight > 0 or config.method.algorithm in OF_RATIO


def check_discriminator(config: RunConfig) -> None:
    """Refuses flags that would have no effect, and a discriminator that could not learn; ValueError, one sentence."""
    method = config.method
    asked = f"--algorithm {method.algorithm}" if method.algorithm in OF_RATIO else "--gen_cls_loss_weight"
    if method.algorithm == "dmd2" and method.gen_cls_loss_weight == 0:
        raise ValueError("--algorithm dmd2 with --gen_cls_loss_weight 0 is --algorithm dmd; use that.")
    if not has_discriminator(config) and method.guidance_cls_loss_weight != USUAL_WEIGHT:
        raise ValueError(
            "--guidance_cls_loss_weight would have no effect without a discriminator; leave it out, or add "
            "--gen_cls_loss_weight."
        )
    if has_discriminator(config) and method.fake_updates_per_step == 0:
        raise ValueError(
            f"{asked} needs a discriminator, which learns in the fake score's updates; raise --fake_updates_per_step."
        )
    if has_discriminator(config) and is_sharded_launch():
        raise ValueError(f"{asked} needs a discriminator, which cannot read features of shards; launch without FSDP.")
