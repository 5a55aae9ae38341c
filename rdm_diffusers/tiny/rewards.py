"""Rewards for the tiny teachers' images: faithfulness to the prompt, and bold or thin strokes, which conflict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .domains import DOMAINS, reader_of

DOMAIN_OF_SIZE = {domain.image_size: domain for domain in DOMAINS.values()}


class PromptFaithfulness:
    """How sure the classifier is that an image shows what its prompt asks for: digits, inks, background, ..."""

    name = "tiny_prompt"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The log-probability of what is asked, averaged over all that is asked.

        Args:
            images: `[B, 3, S, S]` in [0, 1], of the size of a tiny teacher's.
            prompts: B captions of that teacher.

        Returns:
            `[B]`, float32, at most 0, which is certain. Gradients flow to the images, none to the classifier.

        Raises:
            ValueError: for an unknown caption, or images of another size.
        """
        height, width = images.shape[-2:]
        domain = DOMAIN_OF_SIZE.get(height) if height == width else None
        if domain is None:
            sizes = " or ".join(f"{size} x {size}" for size in DOMAIN_OF_SIZE)
            raise ValueError(
                f"The reward {self.name} judges the tiny teachers' pictures of {sizes} pixels, not {height} x {width}; "
                "choose another reward."
            )
        asked = [domain.parse(prompt) for prompt in prompts]
        return reader_of(domain, images.device).log_likelihood(images.float(), asked)


class BlackBoxPromptFaithfulness(PromptFaithfulness):
    """The same number without gradients, to try black-box rewards."""

    name = "tiny_prompt_black_box"
    differentiable = False

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As `PromptFaithfulness`, `[B]`, at most 0. No gradients."""
        return super().__call__(images, prompts)


class Boldness:
    """The distance of the pixels to the background's colour: bold strokes, strong ink. Too much costs fidelity."""

    name = "tiny_bold"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The mean distance to the border's mean colour, as a share of the distance from black to white.

        Args:
            images: `[B, 3, H, W]` in [0, 1].
            prompts: ignored.

        Returns:
            `[B]`, float32, in [0, 1]; 0 for one colour. Gradients flow to the images, to the border, too.
        """
        images = images.float()
        border = torch.ones(images.shape[-2:], dtype=torch.bool, device=images.device)  # one pixel wide
        border[1:-1, 1:-1] = False
        background = images[..., border].mean(-1)[..., None, None]
        return torch.linalg.vector_norm(images - background, dim=1).mean((-2, -1)) / 3**0.5


class Thinness(Boldness):
    """Thin strokes, faint ink: the negative of `Boldness`."""

    name = "tiny_thin"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The negative of `Boldness`, `[B]` in [-1, 0]. Gradients flow to the images."""
        return -super().__call__(images, prompts)
