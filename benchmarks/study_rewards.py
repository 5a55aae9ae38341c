"""The study's own rewards: `tiny_bold` a hundred times as large, and the same as a black box."""

from rdm_diffusers.tiny.rewards import Boldness

BOLD = Boldness()


def bold_100(images, prompts):
    """100 times the reward, with its gradients."""
    return 100 * BOLD(images, prompts)


bold_100.differentiable = True


def bold_black_box(images, prompts):
    """The reward as numbers alone."""
    return BOLD(images, prompts).tolist()
