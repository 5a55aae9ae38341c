"""Rewards: the built-in ones measure what they claim, and whatever a reward answers is checked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_diffusers.rewards import Reward, evaluate, load_reward
from rdm_diffusers.rewards.registry import TINY_REWARDS
from rdm_diffusers.rewards.user_file import NamedReward
from rdm_diffusers.tiny.captions import BACKGROUNDS, CAPTIONS, DRAWINGS, INKS
from rdm_diffusers.tiny.domains import DIGITS_DOMAIN, reader_of

DIFFERENTIABLE = [name for name in TINY_REWARDS if name != "tiny_prompt_black_box"]
PROMPTS = CAPTIONS[:4]


def reward_of(spec: str) -> Reward:
    """A loaded reward without its weight."""
    return load_reward(spec, "cpu").reward


def noisy_images(count: int = 4) -> Tensor:
    """Pictures `[B, 3, 32, 32]` in [0, 1], whose gradients are wanted."""
    return torch.rand(count, 3, 32, 32).requires_grad_()


def stroke() -> Tensor:
    """How much of each pixel a vertical stroke covers: `[1, 1, 32, 32]`."""
    coverage = torch.zeros(1, 1, 32, 32)
    coverage[..., 8:24, 14:18] = 1
    return coverage


def paint(coverage: Tensor, ink: str = "white", background: str = "blue") -> Tensor:
    """A picture `[1, 3, 32, 32]` of strokes."""
    colours = [torch.tensor(colour)[:, None, None] for colour in (BACKGROUNDS[background], INKS[ink])]
    return colours[0] + coverage * (colours[1] - colours[0])


@pytest.mark.parametrize("name", TINY_REWARDS)
def test_every_tiny_reward_gives_one_finite_number_per_image(name: str) -> None:
    weighted = load_reward(name, "cpu")
    scores = evaluate(weighted.reward, noisy_images(), PROMPTS)
    assert isinstance(weighted.reward, Reward)
    assert (weighted.reward.name, weighted.weight) == (name, 1.0)
    assert scores.shape == (4,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", TINY_REWARDS)
@pytest.mark.usefixtures("float64")
def test_a_reward_of_one_image_does_not_depend_on_the_others(name: str) -> None:
    images, reward = noisy_images(), reward_of(name)
    alone = torch.cat([evaluate(reward, images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(evaluate(reward, images, PROMPTS), alone)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_to_the_pixels_are_those_of_finite_differences(name: str) -> None:
    images, reward, step = 0.25 + 0.5 * noisy_images().detach(), reward_of(name), 1e-2
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(evaluate(reward, images, PROMPTS).sum(), images)
    norms = gradient.flatten(1).norm(dim=1)
    direction = gradient / norms[:, None, None, None] + torch.randn_like(gradient) / 50
    with torch.no_grad():
        ahead, behind = (evaluate(reward, images + sign * step * direction, PROMPTS) for sign in (1, -1))
    torch.testing.assert_close((ahead - behind) / (2 * step), (gradient * direction).sum((1, 2, 3)), rtol=0.01, atol=0)


def test_the_gradient_of_a_picture_of_one_colour_is_finite() -> None:
    flat = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    scores = evaluate(reward_of("tiny_bold"), flat, PROMPTS[:1])
    (gradient,) = torch.autograd.grad(scores.sum(), flat)
    assert scores.item() == 0
    assert gradient.isfinite().all()


def test_the_black_box_is_the_differentiable_reward_without_a_graph() -> None:
    images, black_box = noisy_images(), reward_of("tiny_prompt_black_box")
    expected = evaluate(reward_of("tiny_prompt"), images, PROMPTS)
    assert not black_box.differentiable
    for scores in (black_box(images, PROMPTS), evaluate(black_box, images, PROMPTS)):
        assert torch.equal(scores, expected)
        assert not scores.requires_grad
    assert expected.requires_grad


def test_dilated_strokes_are_bolder_and_less_thin() -> None:
    coverage = stroke()
    images = torch.cat([paint(F.max_pool2d(coverage, 2 * r + 1, stride=1, padding=r)) for r in range(4)])
    bold, thin = (evaluate(reward_of(name), images, PROMPTS) for name in ("tiny_bold", "tiny_thin"))
    assert (bold.diff() > 0).all()
    assert torch.equal(thin, -bold)


def test_boldness_is_the_covered_share_times_the_distance_of_the_colours() -> None:
    coverage = stroke()
    distance = torch.dist(torch.tensor(INKS["red"]), torch.tensor(BACKGROUNDS["cyan"])) / 3**0.5
    score = evaluate(reward_of("tiny_bold"), paint(coverage, "red", "cyan"), PROMPTS[:1])
    assert score.item() == pytest.approx(coverage.mean().item() * distance.item(), rel=1e-4)


def test_no_picture_is_bolder_than_1() -> None:
    image = torch.ones(1, 3, 256, 256)
    image[..., 0, :] = image[..., -1, :] = image[..., 0] = image[..., -1] = 0
    assert 0.98 < evaluate(reward_of("tiny_bold"), image, PROMPTS[:1]).item() <= 1


def test_the_right_caption_is_rewarded_more_than_a_wrong_one() -> None:
    pytest.importorskip("sklearn")
    from rdm_diffusers.tiny.handwriting import Handwriting

    reward = reward_of("tiny_prompt")
    images = Handwriting(torch.Generator().manual_seed(3)).draw(list(DRAWINGS))
    right = evaluate(reward, images, CAPTIONS)
    assert right.max() <= 0
    assert right.mean() > -0.01
    for shift in (1, 4, 24):  # another background; another ink; another digit
        wrong = evaluate(reward, images, CAPTIONS[shift:] + CAPTIONS[:shift])
        assert (right - wrong).min() > 1


def test_the_classifier_is_loaded_once_and_keeps_no_gradients() -> None:
    reader_of.cache_clear()
    evaluate(reward_of("tiny_prompt"), noisy_images(), PROMPTS).sum().backward()
    evaluate(reward_of("tiny_prompt_black_box"), noisy_images(), PROMPTS)
    classifier = reader_of(DIGITS_DOMAIN, torch.device("cpu"))
    assert reader_of.cache_info().currsize == 1
    assert isinstance(classifier, torch.nn.Module)
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_a_caption_that_the_tiny_teacher_does_not_know() -> None:
    with pytest.raises(ValueError, match="does not know the caption 'a red cat'; write it like"):
        evaluate(reward_of("tiny_prompt"), noisy_images(1), ["a red cat"])


def test_pictures_that_the_tiny_classifier_cannot_read() -> None:
    with pytest.raises(ValueError, match="pictures of 32 x 32 pixels, not 64 x 48; choose another reward"):
        evaluate(reward_of("tiny_prompt"), torch.rand(1, 3, 64, 48), PROMPTS[:1])


def black_box(answer: object) -> NamedReward:
    """A black box that always gives the same answer."""
    return NamedReward(lambda images, prompts: answer, "mine", False)


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).numpy(),
        [torch.tensor(1.0), 2, torch.tensor(3)],
    ],
    ids=["list", "tuple", "integers", "array", "mixed"],
)
def test_any_list_of_numbers_becomes_a_float32_tensor(answer: object) -> None:
    scores = evaluate(black_box(answer), noisy_images(3), PROMPTS[:3])
    assert torch.equal(scores, torch.tensor([1.0, 2.0, 3.0]))


def test_a_list_of_tensors_keeps_their_gradients() -> None:
    images = noisy_images()
    reward = NamedReward(lambda images, prompts: [image.mean() for image in images], "mine", True)
    evaluate(reward, images, PROMPTS).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / images[0].numel()))


def test_what_is_not_finite_is_passed_on() -> None:
    scores = evaluate(black_box([float("nan"), float("inf"), 1.0]), noisy_images(3), PROMPTS[:3])
    assert scores[0].isnan()
    assert scores[1].isinf()


@pytest.mark.parametrize("answer", [[1.0, 2.0], torch.ones(3, 1), [[1.0]] * 3, 1.0, []])
def test_a_wrong_count_names_the_reward(answer: object) -> None:
    with pytest.raises(ValueError, match=r"The reward mine returned shape \[.*\] for 3 images; return one number per"):
        evaluate(black_box(answer), noisy_images(3), PROMPTS[:3])


@pytest.mark.parametrize("answer", [None, "good", ["good"] * 3, [None] * 3, [[1.0], [1.0, 2.0], []]])
def test_an_answer_that_is_no_number_names_the_reward(answer: object) -> None:
    with pytest.raises(
        ValueError, match=r"The reward mine returned a \w+ that is no tensor of numbers; return a tensor"
    ):
        evaluate(black_box(answer), noisy_images(3), PROMPTS[:3])


def test_a_prompt_is_missing() -> None:
    with pytest.raises(ValueError, match="The reward mine got 2 prompts for 3 images; give one each"):
        evaluate(black_box([1.0] * 3), noisy_images(3), PROMPTS[:2])


def test_a_differentiable_reward_that_loses_the_gradients_is_told_so() -> None:
    reward = NamedReward(lambda images, prompts: images.detach().mean((1, 2, 3)), "mine", True)
    images = noisy_images()
    with pytest.raises(ValueError, match=r"The reward mine calls itself differentiable, but no gradient .* set diff"):
        evaluate(reward, images, PROMPTS)
    assert evaluate(reward, images.detach(), PROMPTS).shape == (4,)
    with torch.no_grad():
        assert evaluate(reward, images, PROMPTS).shape == (4,)


def test_a_black_box_cannot_change_the_images() -> None:
    images = noisy_images()
    before = images.detach().clone()
    reward = NamedReward(lambda images, prompts: images.mul_(255).numpy().mean((1, 2, 3)), "mine", False)
    assert not evaluate(reward, images, PROMPTS).requires_grad
    assert torch.equal(images, before)
