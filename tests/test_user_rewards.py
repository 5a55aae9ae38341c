"""Rewards by their specifications: names, weights, a user's own file, and errors that say what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rdm_diffusers.rewards import Reward, WeightedReward, evaluate, load_reward
from rdm_diffusers.rewards.base import RewardError
from rdm_diffusers.rewards.user_file import NamedReward
from rdm_diffusers.tiny.captions import CAPTIONS

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
        "There is no reward 'tiny_pompt'; use tiny_prompt, tiny_prompt_black_box, tiny_bold, tiny_thin, "
        "hpsv2, hpsv2.0, hpsv2.1, hpsv3, pickscore, clip_score, image_reward, aesthetic, ocr, "
        "path/to/file.py:function, or http://host:port/path."
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
    assert said.endswith("; fix it, or name an instance.")


def test_a_class_whose_instances_cannot_be_called(complaint, user_file) -> None:
    path = user_file("class Mute:\n    pass\n")
    assert complaint(f"{path}:Mute") == (
        f"Instances of Mute in {path} cannot be called; give it __call__(self, images, prompts)."
    )


def test_files_whose_names_differ_in_signs_alone_are_two_files(tmp_path: Path) -> None:
    names = ("a-b.py", "a_b.py", "a b.py", "a.b.py")
    for i, name in enumerate(names):
        (tmp_path / name).write_text(f"def score(images, prompts):\n    return [{i}] * len(prompts)\n")
    rewards = [reward_of(f"{tmp_path / name}:score") for name in names]
    assert [float(evaluate(reward, noisy_images(), PROMPTS)[0]) for reward in rewards] == [0, 1, 2, 3]


def test_a_file_imports_its_neighbours_by_a_dot_and_never_those_of_another_folder(tmp_path: Path) -> None:
    for value, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helper.py").write_text(f"VALUE = {value}\n")
        (tmp_path / folder / "mine.py").write_text(
            "from .helper import VALUE\n\ndef score(images, prompts):\n    return [VALUE] * len(prompts)\n"
        )
    rewards = [reward_of(f"{tmp_path / folder / 'mine.py'}:score") for folder in "ab"]
    assert [float(evaluate(reward, noisy_images(), PROMPTS)[0]) for reward in rewards] == [0, 1]


LEAVES = ("sys.exit(0)", "raise SystemExit", "raise BaseException('gone')", "raise GeneratorExit")


@pytest.mark.parametrize("leave", LEAVES)
def test_a_reward_that_ends_the_program_is_an_error_with_its_name(user_file, leave: str) -> None:
    path = user_file(f"import sys\n\ndef score(images, prompts):\n    {leave}\n")
    with pytest.raises(RewardError, match=rf"^The reward score raised .* at {path}:4 \(.*\); fix it\."):
        evaluate(reward_of(f"{path}:score"), noisy_images(), PROMPTS)


@pytest.mark.parametrize("leave", LEAVES)
def test_a_file_or_a_class_that_ends_the_program_is_an_error_with_its_name(complaint, user_file, leave: str) -> None:
    path = user_file(f"import sys\n\nclass Leaves:\n    def __init__(self):\n        {leave}\n", "class.py")
    assert complaint(f"{path}:Leaves").startswith(f"The class Leaves in {path} could not be made without arguments (")
    path = user_file(f"import sys\n{leave}\n", "file.py")
    assert complaint(f"{path}:score").startswith(f"The reward file {path} fails when it is imported (")


def test_ctrl_c_ends_a_run_while_a_reward_is_asked(user_file) -> None:
    path = user_file("def score(images, prompts):\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        evaluate(reward_of(f"{path}:score"), noisy_images(), PROMPTS)
