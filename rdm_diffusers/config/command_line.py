"""The command line of the training scripts: a flag for every setting, and `--config` for a file of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..bounds import PATH, TOKEN, Bound, Interval, OneOf, Parser, set_bounds
from ..families import use_token
from .checks import check_rewards
from .fields import Setting, settings_of
from .presets import below
from .record import command_line
from .refused import REFUSED, refusal
from .retired import RETIRED, retirement
from .run_config import RunConfig, all_settings, read_yaml, subjects_of
from .secrecy import refuse_secrets
from .subjects import OutputConfig

TOKEN_SAFE_TRACKERS = ("tensorboard", "none")  # the others keep the command line
FEW = 7  # names that the help lists
BOUNDS: dict[str, Bound] = {
    **{each.name: each.flag.bound for each in all_settings() if each.flag.bound is not None},
    "config": PATH,
    "hub_token": TOKEN,
}


def build_parser(description: str | None = None, student: str = "lora") -> Parser:
    """The parser of `train_rdm_lora.py`, or for a `full` student of `train_rdm_full.py`.

    Every help text names the unit and the default. `transformers.HfArgumentParser` is not used: it knows neither
    bounds nor repeated flags, and would rename `--no-use_ema`.
    """
    parser = Parser(description=description)
    parser.add_argument("--config", help="a YAML file of flags and values, as every run writes it; flags go before it")
    for name, subject in subjects_of(student).items():
        group = parser.add_argument_group(name)
        for setting in settings_of(subject):
            group.add_argument(setting.option, *setting.flag.aliases, **_options(setting))
    group.add_argument(
        "--hub_token",
        help="for teacher and student; that of `hf auth login` or HF_TOKEN by default; recorded nowhere "
        "(default: None)",
    )
    set_bounds(parser, BOUNDS)
    for setting in all_settings(student):
        action = next(action for action in parser._actions if action.dest == setting.name)
        action.help = f"{action.help} (default: {shown_default(setting, student)})".replace("%", "%%")
    return parser


def shown_default(setting: Setting, student: str) -> Any:
    """A default as the help shows it."""
    if setting.name == "tracker_project_name":
        return f"rdm-{student}"
    return None if setting.is_repeatable else setting.default


def _options(setting: Setting) -> dict[str, Any]:
    """What argparse is told of a flag; the defaults come later, below those of a file."""
    options: dict[str, Any] = {"dest": setting.name, "help": setting.flag.help}
    bound = setting.flag.bound
    if bound is None:
        return options | {"action": argparse.BooleanOptionalAction}
    if isinstance(bound, OneOf) and isinstance(bound.names, tuple) and len(bound.names) <= FEW:
        options["metavar"] = f"{{{','.join(bound.names)}}}"
    if setting.is_repeatable and (setting.flag.is_list or isinstance(bound, Interval)):
        return options | {"action": "extend", "nargs": "+"}
    return options | ({"action": "append"} if setting.is_repeatable else {})


def parse_args(argv: Sequence[str] | None = None, description: str | None = None, student: str = "lora") -> RunConfig:
    """Parses and checks; wrong arguments end the program with one sentence, before any long work.

    Args:
        argv: the command line; that of the program by default.
        description: of the script, for its help.
        student: `lora` or `full`.
    """
    parser = build_parser(description, student)
    refuse_secrets(parser, argv)
    for word in sys.argv[1:] if argv is None else argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag[2:] in RETIRED:
            parser.error(retirement(flag))
        if flag.startswith("--") and flag[2:] in REFUSED:
            parser.error(refusal(flag[2:]))
    given = {name: value for name, value in vars(parser.parse_within(BOUNDS, argv)).items() if value is not None}
    file, token = given.pop("config", None), given.pop("hub_token", None)
    try:
        said = {**({} if file is None else read_yaml(file)), **given}
        use_given_token(token, said.get("report_to", OutputConfig.report_to))  # first: a LoRA may be on the Hub
        config = RunConfig.of(student, **given) if file is None else RunConfig.from_yaml(file, student, **given)
        check_rewards(config)
        words = [*_words_of(file, given, student), *(sys.argv[1:] if argv is None else argv)]
        return replace(config, command=command_line(f"train_rdm_{student}.py", words))
    except (ValueError, ImportError) as error:
        parser.error(str(error))


def _words_of(file: str | None, given: Mapping[str, Any], student: str) -> list[str]:
    """A file's settings as words of a command line, which others can use without the file."""
    settings = {} if file is None else below(read_yaml(file), given)
    words: list[str] = []
    for setting in all_settings(student):
        name = next((name for name in (setting.name, *setting.names) if settings.get(name) is not None), None)
        if name is None or setting.name in given:
            continue
        value, option = settings[name], setting.option
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [word for one in (value if isinstance(value, list) else [value]) for word in (option, str(one))]
    return words


def use_given_token(token: str | None, report_to: str) -> None:
    """Gives a token to huggingface_hub alone; ValueError if a tracker may record the command line."""
    if token is None:
        return
    if report_to not in TOKEN_SAFE_TRACKERS:
        raise ValueError(
            f"--hub_token would be recorded by --report_to {report_to}, with the command line; leave it out and log in "
            "with `hf auth login`."
        )
    use_token(token)
