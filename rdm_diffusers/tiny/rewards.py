"""Rewards for the tiny teachers' images: faithfulness to the prompt, and bold or thin strokes, which conflict."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .captions import parse_caption
from .classifier import DrawingClassifier, load_classifier
from .handwriting import IMAGE_SIZE


@lru_cache
def _classifier(device: torch.device) -> DrawingClassifier:
    return load_classifier().to(device)


class PromptFaithfulness:
    """How sure the classifier is that an image shows the digit, ink and background that its prompt asks for."""

    name = "tiny_prompt"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The log-probability of what is asked, averaged over the three heads.

        Args:
            images: `[B, 3, 32, 32]` in [0, 1].
            prompts: B captions of the tiny teacher.

        Returns:
            `[B]`, float32, at most 0, which is certain. Gradients flow to the images, none to the classifier.

        Raises:
            ValueError: for an unknown caption, or images of another size.
        """
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"The reward {self.name} judges the tiny teacher's pictures of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, not "
                f"{images.shape[-2]} x {images.shape[-1]}; choose another reward."
            )
        asked = [parse_caption(prompt) for prompt in prompts]
        terms = []
        for head, logits in _classifier(images.device)(images.float()).items():
            index = torch.tensor([getattr(drawing, head) for drawing in asked], device=images.device)
            terms.append(logits.log_softmax(-1).gather(-1, index[:, None])[:, 0])
        return torch.stack(terms).mean(0)


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
