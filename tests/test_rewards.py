"""Rewards: the built-in ones measure what they claim, a user's file becomes one, and errors say what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdm_diffusers.rewards import REWARDS, Reward, WeightedReward, evaluate, load_reward
from rdm_diffusers.rewards.user_file import NamedReward
from rdm_diffusers.tiny.captions import BACKGROUNDS, CAPTIONS, DRAWINGS, INKS

DIFFERENTIABLE = [name for name in REWARDS if name != "tiny_prompt_black_box"]
PROMPTS = CAPTIONS[:4]

RED = """
def red(images, prompts):
    return images[:, 0].mean((1, 2))
"""


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


@pytest.fixture
def user_file(tmp_path: Path):
    """Writes a file of rewards and gives its path."""

    def write(code: str, name: str = "mine.py") -> Path:
        (tmp_path / name).write_text(code)
        return tmp_path / name

    return write


@pytest.fixture
def complaint():
    """The one sentence that loading a specification raises."""

    def load(spec: object) -> str:
        with pytest.raises(ValueError) as raised:
            load_reward(str(spec), "cpu")
        said = str(raised.value)
        assert "\n" not in said
        assert said.endswith(".")
        return said

    return load


@pytest.mark.parametrize("name", REWARDS)
def test_every_built_in_reward_gives_one_finite_number_per_image(name: str) -> None:
    weighted = load_reward(name, "cpu")
    scores = evaluate(weighted.reward, noisy_images(), PROMPTS)
    assert isinstance(weighted.reward, Reward)
    assert (weighted.reward.name, weighted.weight) == (name, 1.0)
    assert scores.shape == (4,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", REWARDS)
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
    from rdm_diffusers.tiny import rewards

    evaluate(reward_of("tiny_prompt"), noisy_images(), PROMPTS).sum().backward()
    evaluate(reward_of("tiny_prompt_black_box"), noisy_images(), PROMPTS)
    classifier = rewards._classifier(torch.device("cpu"))
    assert rewards._classifier.cache_info().currsize == 1
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_a_caption_that_the_tiny_teacher_does_not_know() -> None:
    with pytest.raises(ValueError, match="does not know the caption 'a red cat'; write it like"):
        evaluate(reward_of("tiny_prompt"), noisy_images(1), ["a red cat"])


def test_pictures_that_the_tiny_classifier_cannot_read() -> None:
    with pytest.raises(ValueError, match="pictures of 32 x 32 pixels, not 64 x 48; choose another reward"):
        evaluate(reward_of("tiny_prompt"), torch.rand(1, 3, 64, 48), PROMPTS[:1])


@pytest.mark.parametrize(("suffix", "weight"), [("", 1.0), (":2", 2.0), (":-0.5", -0.5), (":1e-3", 1e-3)])
@pytest.mark.parametrize("own", [False, True])
def test_a_weight_stands_behind_the_last_colon(user_file, own: bool, suffix: str, weight: float) -> None:
    place = f"{user_file(RED)}:red" if own else "tiny_bold"
    weighted = load_reward(place + suffix, "cpu")
    assert isinstance(weighted, WeightedReward)
    assert weighted.weight == weight


def test_a_function_in_a_file_is_a_black_box_of_its_own_name(user_file) -> None:
    images, reward = noisy_images(), reward_of(f"{user_file(RED)}:red")
    scores = evaluate(reward, images, PROMPTS)
    assert (reward.name, reward.differentiable) == ("red", False)
    assert not scores.requires_grad
    torch.testing.assert_close(scores, images[:, 0].mean((1, 2)).detach())


def test_a_function_may_have_the_attributes_of_a_reward(user_file) -> None:
    images = noisy_images()
    code = RED + "\nred.differentiable, red.name = True, 'redness'\n"
    reward = reward_of(f"{user_file(code)}:red")
    assert (reward.name, reward.differentiable) == ("redness", True)
    evaluate(reward, images, PROMPTS).sum().backward()
    torch.testing.assert_close(images.grad[:, 0], torch.full((4, 32, 32), 1 / 1024))


CLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Channel:
    index: int = 0
    differentiable = True

    def __call__(self, images, prompts):
        return images[:, self.index].mean((1, 2))

blue = Channel(2)
"""


def test_a_class_is_made_and_an_instance_taken_as_it_is(user_file) -> None:
    path, images = user_file(CLASS), noisy_images()
    for name, channel in (("Channel", 0), ("blue", 2)):
        reward = reward_of(f"{path}:{name}")
        assert (reward.name, reward.differentiable) == (name, True)
        torch.testing.assert_close(evaluate(reward, images, PROMPTS), images[:, channel].mean((1, 2)))


MODULE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.dropout = torch.nn.Conv2d(3, 1, 3), torch.nn.Dropout()

    def forward(self, images, prompts):
        return self.dropout(self.conv(images)).mean((1, 2, 3))
"""


def test_a_module_is_frozen_and_in_evaluation_mode(user_file) -> None:
    reward = reward_of(f"{user_file(MODULE)}:Net")
    assert isinstance(reward, NamedReward)
    assert not reward.function.training
    assert not any(parameter.requires_grad for parameter in reward.function.parameters())
    assert evaluate(reward, noisy_images(), PROMPTS).shape == (4,)


def test_a_file_is_executed_once_whatever_is_taken_from_it(user_file, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'log')!r}, 'a').write('.')\n{RED}\nalso_red = red\n"
    path = user_file(code)
    for name in ("red", "also_red"):
        load_reward(f"{path}:{name}", "cpu")
    assert (tmp_path / "log").read_text() == "."


def test_files_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            f"def score(images, prompts):\n    return [{value}] * len(prompts)\n"
        )
    first, second = (reward_of(f"{tmp_path / folder / 'mine.py'}:score") for folder in "ab")
    images = noisy_images()
    assert (evaluate(first, images, PROMPTS)[0], evaluate(second, images, PROMPTS)[0]) == (1, 2)


def test_an_unknown_name(complaint) -> None:
    assert complaint("tiny_pompt") == (
        "There is no reward 'tiny_pompt'; use tiny_prompt, tiny_prompt_black_box, tiny_bold, tiny_thin, or "
        "path/to/file.py:function."
    )


@pytest.mark.parametrize("spec", ["tiny_bold:strong", "tiny_bold:", "mine.py:red:much"])
def test_a_weight_that_is_no_number(complaint, spec: str) -> None:
    said = complaint(spec)
    assert said.startswith(f"The weight {spec.split(':')[-1]!r} in --reward {spec!r} is not a number; write name, ")


@pytest.mark.parametrize("weight", ["0", "-0.0", "nan", "inf", "-inf"])
def test_a_weight_that_is_nothing_or_not_finite(complaint, weight: str) -> None:
    said = complaint(f"tiny_bold:{weight}")
    assert said.startswith(
        f"The weight in --reward 'tiny_bold:{weight}' must be finite and not 0; leave the reward out"
    )


@pytest.mark.parametrize("spec", ["tiny_bold:1:2", "mine.py:red:1:2"])
def test_too_many_colons(complaint, spec: str) -> None:
    assert complaint(spec).startswith(f"--reward {spec!r} has too many colons; write name, name:weight, ")


@pytest.mark.parametrize("spec", ["a:b/mine.py:red", "C:\\mine.py:red:2", "a.py:b.py:red"])
def test_a_path_with_a_colon(complaint, spec: str) -> None:
    assert complaint(spec) == (
        f"The path in --reward {spec!r} contains a colon, which separates path, function and weight; move or rename "
        "the file."
    )


@pytest.mark.parametrize("spec", ["mine.py", "mine.py:"])
def test_a_file_without_a_function(complaint, spec: str) -> None:
    assert complaint(spec) == f"--reward {spec!r} names a file but no function; write mine.py:function."


def test_a_missing_file(complaint, tmp_path: Path) -> None:
    path = tmp_path / "nowhere.py"
    assert complaint(f"{path}:red") == f"The reward file {path} does not exist; give the path of a Python file."


@pytest.mark.parametrize("name", ["rde", "SIZE"])
def test_a_function_that_the_file_does_not_have(complaint, user_file, name: str) -> None:
    path = user_file(
        "from pathlib import Path\nfrom math import pi, sin\nSIZE = 3\n" + RED + CLASS.split("annotations")[1]
    )
    assert complaint(f"{path}:{name}") == f"{path} has no callable {name!r}; name one of red, Channel, blue."


def test_a_file_without_any_function(complaint, user_file) -> None:
    path = user_file("SIZE = 3\n")
    said = complaint(f"{path}:red")
    assert said == f"{path} has no callable 'red'; define it as a function (images, prompts)."


@pytest.mark.parametrize(
    ("code", "reason", "cause"),
    [
        ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'", ModuleNotFoundError),
        ("def red(:\n", "SyntaxError: ", SyntaxError),
        ("raise SystemExit(2)\n", "SystemExit: 2", SystemExit),
        ("raise ValueError('one\\ntwo')\n", "ValueError: one)", ValueError),
    ],
)
def test_a_file_that_fails_keeps_the_cause_and_may_be_mended(user_file, code: str, reason: str, cause: type) -> None:
    path = user_file(code)
    with pytest.raises(ValueError, match=re.escape(f"{path} fails when it is imported ({reason}")) as raised:
        load_reward(f"{path}:red", "cpu")
    assert isinstance(raised.value.__cause__, cause)
    user_file(RED)
    assert reward_of(f"{path}:red").name == "red"


def test_a_class_that_needs_arguments(complaint, user_file) -> None:
    path = user_file("class Needy:\n    def __init__(self, size):\n        pass\n")
    said = complaint(f"{path}:Needy")
    assert said.startswith(f"The class Needy in {path} could not be made without arguments (TypeError: ")
    assert said.endswith("; mend it, or name an instance.")


def test_a_class_whose_instances_cannot_be_called(complaint, user_file) -> None:
    path = user_file("class Mute:\n    pass\n")
    assert complaint(f"{path}:Mute") == (
        f"Instances of Mute in {path} cannot be called; give it __call__(self, images, prompts)."
    )


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
