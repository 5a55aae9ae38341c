"""What the tiny teachers draw: captions, and what draws and reads their pictures. Ask for it by a teacher's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from . import TINY_NAME, TINY_SCENES_NAME
from .captions import CAPTIONS, parse_caption
from .classifier import FEATURE_DIM as DIGIT_FEATURES, load_classifier
from .handwriting import IMAGE_SIZE as DIGIT_SIZE, Handwriting
from .scene_classifier import FEATURE_DIM as SCENE_FEATURES, load_scene_classifier
from .scene_drawing import SceneDrawing
from .scenes import IMAGE_SIZE as SCENE_SIZE, SCENE_CAPTIONS, parse_scene

MEASURED_REWARDS = ("tiny_prompt", "tiny_bold")  # which every evaluation measures


class Reader(Protocol):
    """A trained classifier of a domain's pictures `[B, 3, S, S]` in [0, 1], frozen."""

    def features(self, images: Tensor) -> Tensor:
        """Features `[B, D]`. Gradients flow to the images."""

    def correct(self, images: Tensor, drawings: Sequence[Any]) -> dict[str, Tensor]:
        """Whether each image shows what it should, bool `[B]`, part by part, and "all"."""

    def log_likelihood(self, images: Tensor, drawings: Sequence[Any]) -> Tensor:
        """The mean log-probability `[B]` of what each image should show. Gradients flow to the images."""


class Pen(Protocol):
    """Draws a domain's pictures from real handwriting."""

    def draw(self, drawings: list[Any]) -> Tensor:
        """Images `[B, 3, S, S]` in [0, 1]."""


@dataclass(frozen=True)
class Domain:
    """The pictures of one or more tiny teachers.

    Args:
        name: of its feature network, as `--features` names it.
        image_size: S, pixels.
        captions: the teachers' own prompts.
        parse: a caption -> what it asks for, which has `held_out`; ValueError for an unknown caption.
        load_reader: its classifier.
        feature_dim: D, of the classifier.
        pen: draws with a generator; ImportError without the scans of handwriting.
    """

    name: str
    image_size: int
    captions: tuple[str, ...]
    parse: Callable[[str], Any]
    load_reader: Callable[[], Any]
    feature_dim: int
    pen: Callable[[Generator], Pen]

    def knows(self, prompts: Sequence[str]) -> bool:
        """Whether all prompts can be parsed."""
        try:
            return bool([self.parse(prompt) for prompt in prompts])
        except ValueError:
            return False


DIGITS_DOMAIN = Domain(TINY_NAME, DIGIT_SIZE, CAPTIONS, parse_caption, load_classifier, DIGIT_FEATURES, Handwriting)
SCENES_DOMAIN = Domain(
    TINY_SCENES_NAME, SCENE_SIZE, SCENE_CAPTIONS, parse_scene, load_scene_classifier, SCENE_FEATURES, SceneDrawing
)
DOMAINS = {domain.name: domain for domain in (DIGITS_DOMAIN,)}  # by the name of the feature network


@lru_cache
def reader_of(domain: Domain, device: torch.device) -> Reader:
    """The domain's classifier on a device, loaded once."""
    return domain.load_reader().to(device)


def domain_of_captions(prompts: Sequence[str]) -> Domain | None:
    """The domain whose captions all prompts are; None if there is none."""
    return next((domain for domain in DOMAINS.values() if domain.knows(prompts)), None)


def domain_of(teacher: str) -> Domain:
    """The domain of a tiny teacher by its name."""
    return SCENES_DOMAIN if teacher == TINY_SCENES_NAME else DIGITS_DOMAIN
