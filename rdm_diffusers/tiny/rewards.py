"""Rewards for the tiny teacher's pictures: faithfulness to the prompt, and bold or thin strokes, which conflict."""

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
    """How sure the classifier is that a picture shows the digit, ink and background that its prompt asks for."""

    name = "tiny_prompt"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The log-probability of what is asked, averaged over the three heads.

        Args:
            images: `[B, 3, 32, 32]` in [0, 1].
            prompts: B captions of the tiny teacher.

        Returns:
            `[B]`, float32, at most 0; 0 is certain. Gradients flow to the images, none to the classifier.

        Raises:
            ValueError: for a caption that the tiny teacher does not know, or pictures of another size.
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
    """The very same number without gradients, to try out what is done with rewards that have none."""

    name = "tiny_prompt_black_box"
    differentiable = False

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As `PromptFaithfulness`, `[B]`, at most 0. No gradients."""
        return super().__call__(images, prompts)


class Boldness:
    """How far the pixels are from the background's colour: bold strokes, strong ink. Overdone, it costs fidelity."""

    name = "tiny_bold"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The mean distance to the mean colour of the border, one pixel wide, as a share of that from black to white.

        Args:
            images: `[B, 3, H, W]` in [0, 1].
            prompts: ignored.

        Returns:
            `[B]`, float32, in [0, 1]; 0 for a picture of one colour. Gradients flow to the images, border included.
        """
        images = images.float()
        border = torch.ones(images.shape[-2:], dtype=torch.bool, device=images.device)
        border[1:-1, 1:-1] = False
        background = images[..., border].mean(-1)[..., None, None]
        return torch.linalg.vector_norm(images - background, dim=1).mean((-2, -1)) / 3**0.5


class Thinness(Boldness):
    """Thin strokes, faint ink: the negative of `Boldness`, so the two conflict by construction."""

    name = "tiny_thin"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As `Boldness` with the sign turned, `[B]` in [-1, 0]. Gradients flow to the images."""
        return -super().__call__(images, prompts)
