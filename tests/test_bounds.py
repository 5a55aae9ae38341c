"""Every flag of every command has bounds, and whatever lies outside of them is one sentence that names the flag."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping

import pytest

from rdm_diffusers.bounds import Bound, Interval, OneOf, Parser, Text, flag_of, is_git_name, real, stays_inside, whole
from rdm_diffusers.commands import card, demo, export, push
from rdm_diffusers.config import LoraStudentConfig, RunConfig, all_settings
from rdm_diffusers.config.command_line import BOUNDS, build_parser, parse_args, shown_default
from rdm_diffusers.evaluation import command as evaluation
from rdm_diffusers.training.assembly import lora_config

# Every command: its parser, its table, and what must be given.
COMMANDS: dict[str, tuple[Parser, Mapping[str, Bound], list[str]]] = {
    "train_rdm_lora.py": (build_parser(), BOUNDS, []),
    "train_rdm_full.py": (build_parser(student="full"), BOUNDS, []),
    "rdm-evaluate": (evaluation.make_parser(), evaluation.BOUNDS, ["--teacher", "tiny", "--output_dir", "out"]),
    "rdm-evaluate compare": (evaluation.make_compare_parser(), evaluation.COMPARE_BOUNDS, ["a", "b"]),
    "rdm-export": (export.make_parser(), export.BOUNDS, ["student", "--format", "lora", "--output_dir", "out"]),
    "rdm-push": (push.make_parser(), push.BOUNDS, ["student", "me/student"]),
    "rdm-card": (card.make_parser(), card.BOUNDS, ["student"]),
    "rdm-demo": (demo.make_parser(), demo.BOUNDS, ["student"]),
}
PLACES = {"source": 0, "folder": 0, "repo_id": 1, "a": 0, "b": 1}  # of arguments that are no flags


def flags(kind: type | tuple = object) -> list:
    """Every argument with a value: the command's name and the argument, where its bound is of a kind."""
    return [
        pytest.param(command, action, id=f"{command} {flag_of(action)}")
        for command, (parser, bounds, _) in COMMANDS.items()
        for action in parser._actions
        if action.nargs != 0 and isinstance(bounds.get(action.dest), kind)
    ]


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture):
    """What a command says of a value, in one line without the program's name."""

    def run(command: str, action: argparse.Action, value: str) -> str:
        parser, bounds, required = COMMANDS[command]
        words = list(required)
        if action.dest in PLACES:
            words[PLACES[action.dest]] = value
        elif flag_of(action) in words:
            words[words.index(flag_of(action)) + 1] = value
        elif action.nargs == "*":
            words += [flag_of(action), value]
        else:
            other = {"--teacher", "tiny"} if action.dest in ("student", "images") else set()
            words = [word for word in words if word not in other]
            words.append(f"{flag_of(action)}={value}")
        with pytest.raises(SystemExit) as ended:
            parser.parse_within(bounds, words)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix(f"{parser.prog}: error: ")

    return run


# --- no flag is forgotten -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_with_a_value_has_choices_or_bounds_and_numbers_have_an_interval(command: str) -> None:
    parser, bounds, _ = COMMANDS[command]
    for action in parser._actions:
        if action.nargs == 0 or action.choices is not None:
            continue
        bound = bounds.get(action.dest)
        assert isinstance(bound, Bound), f"{flag_of(action)} has no bounds"
        is_number = isinstance(action.default, int | float) or action.type in (int, float)
        assert isinstance(bound, Interval) or not is_number, f"{flag_of(action)} takes numbers and has no interval"
        assert action.type == (bound.parse if isinstance(bound, Interval) else None), flag_of(action)


def test_no_bounds_are_left_over_from_a_flag_that_is_gone() -> None:
    for bounds in {id(bounds): bounds for _, bounds, _ in COMMANDS.values()}.values():
        parsers = [parser for parser, own, _ in COMMANDS.values() if own is bounds]
        assert set(bounds) <= {action.dest for parser in parsers for action in parser._actions}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_default_lies_in_its_bounds(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    parser, bounds, _ = COMMANDS[command]
    for action in parser._actions:
        if action.default is not None and action.dest in bounds and action.default != ():
            assert bounds[action.dest].problem(parser.get_default(action.dest)) is None, flag_of(action)


@pytest.mark.parametrize("student", ["lora", "full"])
def test_every_default_of_a_run_lies_in_its_bounds_and_is_in_the_help(
    student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    said = " ".join(build_parser(student=student).format_help().split())
    for setting in all_settings(student):
        default = setting.default
        assert default is None or setting.checked(default) == default, setting.name
        assert setting.option in said and f"(default: {shown_default(setting, student)})" in said


def test_no_value_of_python_slips_past_the_bounds() -> None:
    for values, said in (({"rank": True}, "--rank: 'True' is no whole number"), ({"seed": -1}, "--seed is -1; it must"),
                         ({"use_ema": 1}, "--use_ema is 1; it must be true or false."),
                         ({"algorithm": "ddpo"}, "--algorithm is ddpo; it must be dmd, gndm, gndmr,"),
                         ({"rnak": 1}, "There is no setting rnak")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            RunConfig.of(**values)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_number_gives_its_range(command: str) -> None:
    parser, bounds, _ = COMMANDS[command]
    said = " ".join(parser.format_help().split())
    for action in parser._actions:
        bound = bounds.get(action.dest)
        if isinstance(bound, Interval) and not bound.says:
            assert f"; {bound.range}" in str(action.help) and f"; {bound.range}" in said


# --- numbers ------------------------------------------------------------------------------------------------------


def outside(bound: Interval) -> list[str]:
    """Numbers just outside an interval on either side, and those that lie in none."""
    low, high = bound.ends
    step = 1 if bound.whole else 0.5
    below = low if bound.text[0] == "(" else low - step
    above = [] if high == math.inf else [high if bound.text[-1] == ")" else high + step]
    return [str(below), *map(str, above), "nan", "inf", "-inf", "1e999", "9" * 400]


@pytest.mark.parametrize(("command", "action"), flags(Interval))
def test_a_number_outside_its_bounds_nan_and_infinity_are_refused_with_what_would_do(
    complaint, command: str, action: argparse.Action
) -> None:
    bound = COMMANDS[command][1][action.dest]
    assert isinstance(bound, Interval)
    for value in outside(bound):
        said = complaint(command, action, value)
        assert flag_of(action) in said and f"it must {bound.wants}" in said
    for text in ("", "many", "1,5"):
        assert f"{text!r} is no " in complaint(command, action, text)


@pytest.mark.parametrize(("command", "action"), flags(Interval))
def test_the_ends_of_the_bounds_are_taken_if_they_belong_to_them(command: str, action: argparse.Action) -> None:
    bound = COMMANDS[command][1][action.dest]
    assert isinstance(bound, Interval)
    low, high = bound.ends
    assert (low in bound) == (bound.text[0] == "[") and (high in bound) == (bound.text[-1] == "]")
    assert all(bound.parse(str(other)) in bound for other in bound.also)


def test_intervals_say_in_words_what_they_take() -> None:
    assert whole("[1, 8]").problem(9) == "is 9; it must be at least 1 and at most 8"
    assert whole("[2, 8]", also=(0,)).problem(1) == "is 1; it must be at least 2 and at most 8, or be 0"
    assert real("[0, 1)").problem(1.0) == "is 1.0; it must lie in [0, 1)"
    assert real("(0, inf)").problem(0.0) == "is 0.0; it must be a finite number above 0"
    assert real("[0, inf)").problem(math.inf) == "is inf; it must be a finite number of 0 or more"
    assert [bound.range for bound in (whole("[1, 8]"), COUNTS, real("(0, inf)"), real("[0, 1)"))] == [
        "1 to 8", "1 or more", "above 0", "[0, 1)",
    ]  # fmt: skip


COUNTS = BOUNDS["max_train_steps"]


# --- names and texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "action"), flags((Text, OneOf)))
def test_an_empty_or_blank_text_is_refused_and_named(complaint, command: str, action: argparse.Action) -> None:
    for value in ("", "  ", "\t"):
        said = complaint(command, action, value)
        assert said.startswith(f"{flag_of(action)} is empty; it must be ") and said.endswith(".")


@pytest.mark.parametrize(
    ("flag", "wrong", "right"),
    [
        ("lr_scheduler", "cosin", "cosine"),
        ("report_to", "tensorbord", "tensorboard"),
        ("attention_backend", "native_flash", "_native_flash"),
        ("torch_compile_backend", "indctor", "inductor"),
    ],
)
def test_a_name_that_is_not_there_is_refused_with_the_one_that_is_like_it_and_all_that_are_there(
    capsys: pytest.CaptureFixture, flag: str, wrong: str, right: str
) -> None:
    with pytest.raises(SystemExit):
        parse_args([f"--{flag}", wrong])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--{flag} is {wrong} (did you mean {right}" in said
    assert f"{right}" in said.split("it must be")[1]


@pytest.mark.parametrize("name", ["constant", "cosine", "cosine_with_restarts", "linear", "polynomial"])
def test_every_schedule_that_needs_no_further_arguments_is_taken(name: str) -> None:
    assert parse_args(["--lr_scheduler", name]).optimisation.lr_scheduler == name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr_scheduler", "piecewise_constant"], "--lr_scheduler is piecewise_constant"),  # needs rules
        (["--lr_scheduler", "polynomial", "--learning_rate", "1e-8"], "--lr_scheduler polynomial ends at 1e-07, so"),
        (["--mixed_precision", "fp8"], "--mixed_precision is fp8; it must be no, bf16 or fp16."),
        (["--logging_dir", "/somewhere"], "--logging_dir is /somewhere; it must be a relative path that stays inside"),
        (["--logging_dir", "a/../../b"], "--logging_dir is a/../../b; it must be a relative path that stays inside"),
        (["--tracker_project_name", "../x"], "--tracker_project_name is ../x; it must be a relative path that stays"),
        (["--hub_revision", "my branch"], "--hub_revision is my branch; it must be a branch, a tag or a commit"),
        (["--revision", "a..b"], "--revision is a..b; it must be a branch, a tag or a commit"),
        (["--variant", "fp16/x"], "--variant is fp16/x; it must be one word, for example fp16."),
        (["--num_eval_images", "1"], "--num_eval_images is 1; it must be at least 2 and at most 1000000, or be 0."),
        (["--eta", "0.5"], "--eta is 0.5; it must be 1 or 0, because no stock scheduler samples in between."),
        (["--validation_prompt", "a", "--validation_prompt", ""], "--validation_prompt is empty; it must be a text."),
        (["--reward", "tiny_bold", "--reward", " "], "--reward is empty; it must be a reward's name, path"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_else_is_out_of_bounds(capsys: pytest.CaptureFixture, words: list[str], said: str) -> None:
    with pytest.raises(SystemExit):
        parse_args(words)
    assert f"error: {said}" in capsys.readouterr().err.splitlines()[-1]


def test_more_validation_prompts_than_pictures_are_refused_not_dropped(capsys: pytest.CaptureFixture) -> None:
    prompts = [word for letter in "abc" for word in ("--validation_prompt", letter)]
    with pytest.raises(SystemExit):
        parse_args([*prompts, "--num_validation_images", "2"])
    assert (
        "--num_validation_images is 2, too few to show all 3 that --validation_prompt gives; it must be at least 3."
        in (capsys.readouterr().err)
    )
    assert parse_args([*prompts, "--num_validation_images", "3"]).output.validation_prompt == ("a", "b", "c")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr_scheduler", "constant", "--lr_warmup_steps", "5"], "--lr_warmup_steps has no effect with"),
        (["--pretrained_model", "me/model", "--num_eval_images", "100"], "--num_eval_images measures students of the"),
    ],
)
def test_a_flag_without_effect_is_said_to_have_none(words: list[str], said: str) -> None:
    with pytest.warns(UserWarning, match=f"^{said}"):
        parse_args(words)


@pytest.mark.parametrize("command", ["train_rdm_lora.py", "rdm-push", "rdm-export"])
def test_a_token_that_is_none_is_refused_and_never_shown(complaint, command: str) -> None:
    parser = COMMANDS[command][0]
    action = next(action for action in parser._actions if action.dest in ("hub_token", "token"))
    for token in ("hf_secret\n", "hf_sec ret", "hf_sécret", "Bearer hf_secret"):
        said = complaint(command, action, token)
        assert said.endswith("is not shown here; it must be one word, as `hf auth login` takes it.")
        assert "sec" not in said and "séc" not in said


def test_the_names_of_branches_and_places_inside_a_folder() -> None:
    assert all(map(is_git_name, ("main", "v1.0", "refs/pr/3", "feature/x", "0123abcd")))
    assert not any(map(is_git_name, ("a b", "a..b", "-x", "/x", "x/", "x.lock", "a~1", "x\n", "a//b", "x@{0}")))
    assert all(map(stays_inside, ("logs", "a/b", ".", "a/../b")))
    assert not any(map(stays_inside, ("/a", "..", "../a", "a/../../b")))


def test_blanks_after_the_commas_of_layers_are_no_part_of_their_names() -> None:
    from rdm_diffusers.families import FAMILIES

    student = parse_args(["--lora_layers", " to_q, to_k ,ff.net.2"]).student
    assert isinstance(student, LoraStudentConfig) and student.lora_layers == "to_q,to_k,ff.net.2"
    layers = lora_config(FAMILIES["StableDiffusionPipeline"], student).target_modules
    assert set(layers or ()) == {"to_q", "to_k", "ff.net.2"}


# --- unknown flags ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "word", "like"),
    [
        ("train_rdm_lora.py", "--lora_layer", "--lora_layers"),
        ("train_rdm_full.py", "--learning_rat", "--learning_rate"),
        ("rdm-evaluate", "--num_image", "--num_images"),
        ("rdm-evaluate compare", "--ignor", "--ignore"),
        ("rdm-export", "--output_di", "--output_dir"),
        ("rdm-push", "--hub_toke", "--hub_token"),
        ("rdm-card", "--overwrit", "--overwrite"),
        ("rdm-demo", "--server_nam", "--server_name"),
    ],
)
def test_no_flag_may_be_abbreviated_and_an_unknown_one_is_told_what_is_like_it(
    capsys: pytest.CaptureFixture, command: str, word: str, like: str
) -> None:
    parser, bounds, required = COMMANDS[command]
    for words in ([word, "hf_x"], [f"{word}=hf_x"]):
        with pytest.raises(SystemExit):
            parser.parse_within(bounds, [*required, *words])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"unrecognized arguments: {word} (did you mean {like}" in said
        assert "hf_x" not in said  # which may be a token


def test_pictures_too_few_for_a_distance_are_refused_before_any_is_drawn(capsys: pytest.CaptureFixture) -> None:
    words = ["--images", "pictures", "--output_dir", "out", "--reference_data", "reference", "--num_images", "1"]
    with pytest.raises(SystemExit):
        evaluation.parse_args(words)
    assert "--num_images is 1; a Fréchet distance to a reference needs at least 2 pictures." in capsys.readouterr().err
