"""Rewards as functions in Python: a run with them equals one with the functions in a file; its record names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parts import read_state, run_arguments

import train_rdm_lora
from rdm_diffusers import RunConfig, Trainer
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.hub.card import write_card
from rdm_diffusers.rewards import REWARDS, functions_by_name, load_reward, with_functions
from rdm_diffusers.tiny.rewards import Boldness

GNDMR = dict(algorithm="gndmr", checkpointing_steps=1)
IN_A_FILE = """
def redness(images, prompts):
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))

redness.differentiable = True
"""


def redness(images, prompts):
    """How much redder than green and blue a picture is."""
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


redness.differentiable = True


def darkness(images, prompts):
    """A black box."""
    return [1 - float(image.mean()) for image in images]


class Contrast(torch.nn.Module):
    """A reward with a weight of its own."""

    name, differentiable = "contrast", True

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, images, prompts):
        return self.scale * images.flatten(1).std(1)


@pytest.fixture
def config(teacher_folder: Path, prompts_file: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """The configuration of a tiny run with rewards, in the folder `student` or another."""

    def make(folder: str = "student", **changes) -> RunConfig:
        return parse_without_rewards(run_arguments(teacher_folder, prompts_file, tmp_path / folder), changes)

    return make


def parse_without_rewards(argv: list[str], changes: dict) -> RunConfig:
    values = parse_args(argv).as_arguments()
    return RunConfig.of(**{name: value for name, value in {**values, **GNDMR, **changes}.items() if value is not None})


def trained(config: RunConfig, *funcs, weights=None) -> dict[str, torch.Tensor]:
    """The newest checkpoint of a run."""
    with Trainer(config, reward_funcs=funcs, reward_weights=weights) as trainer:
        trainer.train()
        trainer.export()
    return read_state(Path(config.output.output_dir) / "checkpoint-2")


def test_a_function_trains_the_student_that_the_same_function_in_a_file_trains(config, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(IN_A_FILE)
    in_file = trained(config("file", reward=["tiny_bold", f"{tmp_path / 'mine.py'}:redness:0.5"]))
    given = trained(config("python", reward=["tiny_bold"]), redness, weights=[0.5])
    assert in_file.keys() == given.keys() and all(torch.equal(in_file[name], given[name]) for name in given)
    other = trained(config("other", reward=["tiny_bold"]), redness)
    assert any(not torch.equal(other[name], given[name]) for name in given)


def test_functions_modules_and_reward_objects_with_and_without_gradients_work_together(config, tmp_path: Path) -> None:
    with Trainer(config(), reward_funcs=[darkness, Contrast(), Boldness()]) as trainer:
        trainer.load()
        kinds = {weighted.reward.name: weighted.reward.differentiable for weighted in trainer.rewards}
        assert kinds == {"darkness": False, "contrast": True, "tiny_bold": True}
        assert trainer.train().updates == 2


def test_the_record_names_the_functions_and_repeats_the_run_with_them(config, tmp_path: Path) -> None:
    first = trained(config(), redness, darkness, weights=[0.5, 1])
    text = (tmp_path / "student" / "config.yaml").read_text()
    assert "- python:redness:0.5\n- python:darkness\n" in text
    assert text.startswith(
        "# Starts this run again: Trainer(RunConfig.from_yaml(THIS_FILE), reward_funcs=[redness, darkness])\n"
    )
    assert "python:redness:0.5, python:darkness; share 0.2" in write_card(tmp_path / "student").read_text()
    again = RunConfig.from_yaml(tmp_path / "student" / "config.yaml", output_dir=str(tmp_path / "again"))
    second = trained(again, darkness, redness)  # their weights are the file's
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_resumes_with_the_same_functions_only(config, tmp_path: Path) -> None:
    whole = trained(config("whole"), redness, weights=[2.0])
    with Trainer(config(max_train_steps=1), reward_funcs=[redness], reward_weights=[2.0]) as trainer:
        trainer.train()
    onwards = config(resume_from_checkpoint="latest")
    for funcs, weights in (([darkness], [2.0]), ([redness], [1.0]), ([redness, darkness], [2.0, 1.0])):
        with pytest.raises(ValueError, match=r"other arguments: --reward \(was \['python:redness:2.0'\], is "):
            Trainer(onwards, reward_funcs=funcs, reward_weights=weights).check()
    resumed = trained(onwards, redness, weights=[2.0])
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_command_line_cannot_repeat_or_resume_a_run_with_functions(config, tmp_path: Path) -> None:
    trained(config(), redness)
    argv = ["--config", str(tmp_path / "student" / "config.yaml")]
    for more in (["--resume_from_checkpoint", "latest"], ["--output_dir", str(tmp_path / "again")]):
        with pytest.raises(ValueError, match="is a function in Python; give it as Trainer") as raised:
            train_rdm_lora.main([*argv, *more])
        assert "--reward path/to/file.py:redness." in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="is a function in Python"):
        load_reward("python:redness", "cpu")


@pytest.mark.parametrize(
    ("funcs", "weights", "changes", "said"),
    [
        ([], None, {}, "--algorithm gndmr needs external rewards"),
        ([redness], None, {"algorithm": "gndm"}, "--algorithm gndm takes no rewards; use --algorithm gndmr"),
        ([redness], [1, 2], {}, "reward_funcs has 1 functions, and reward_weights 2 weights"),
        ([redness, redness], None, {}, "two functions with the name redness"),
        ([lambda images, prompts: images.mean((1, 2, 3))], None, {}, "with the name '<lambda>'; give it an attribute"),
        ([Contrast], None, {}, "which is no function of images and prompts"),
        (["hpsv2"], None, {}, "name built-in rewards in the configuration's `reward`"),
    ],
)
def test_functions_that_do_not_fit_are_refused_at_once(config, funcs, weights, changes, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        Trainer(config(**changes), reward_funcs=funcs, reward_weights=weights)


def test_a_weight_of_zero_and_the_name_of_another_reward_are_refused_before_the_teacher_is_loaded(config) -> None:
    with pytest.raises(ValueError, match="must be finite and not 0"):
        Trainer(config(), reward_funcs=[redness], reward_weights=[0]).check()
    with pytest.raises(ValueError, match="have one name"):
        Trainer(config(reward=["tiny_bold"]), reward_funcs=[Boldness()]).check()


def test_no_built_in_reward_has_the_name_that_marks_functions() -> None:
    assert "python" not in REWARDS
    functions = functions_by_name(redness)  # one alone, as in TRL
    assert functions == functions_by_name([redness])
    assert with_functions(["tiny_bold"], functions, None) == ("tiny_bold", "python:redness")
    assert with_functions(["python:redness:3"], functions, None) == ("python:redness:3",)
    assert with_functions(["python:redness:3"], functions, [0.25]) == ("python:redness:0.25",)
    both = functions_by_name([darkness, redness])  # an earlier run's order stays, so that it resumes
    assert with_functions(["python:redness:3"], both, None) == ("python:redness:3", "python:darkness")
    assert with_functions(["python:redness:3"], both, [1, 3]) == ("python:redness:3.0", "python:darkness")
