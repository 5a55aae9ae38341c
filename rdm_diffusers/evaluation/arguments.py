"""The command line of `rdm-evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

from ..bounds import (
    COUNT,
    FREE_TEXT,
    GUIDANCE,
    MODEL,
    PATH,
    REVISION,
    SIDE,
    STEPS,
    TOKENS,
    VARIANT,
    Bound,
    Parser,
    Text,
    set_bounds,
    whole,
)  # fmt: skip
from ..tiny import is_tiny
from .features import FEATURES
from .measuring import MeasuringOptions
from .prompt_sets import PROMPT_SETS
from .samplers import FLOW_SOLVERS, TEACHER_SOLVERS
from .subjects import DTYPES, Kind, SamplingOptions, tiny_teacher

FIRST_SEED = 1_000_000  # far from the seeds of the tiny teachers' references
TINY_REWARDS = ("tiny_prompt", "tiny_bold")
SOLVERS = tuple(dict.fromkeys([*TEACHER_SOLVERS, *FLOW_SOLVERS]))
OF_TEACHERS = ("guidance_scale", "solver", "resolution", "max_sequence_length", "variant")
EPILOG = "Two results side by side: rdm-evaluate compare a.json b.json"

PLACE = Text("a folder, a file, or a tiny teacher's name")
# fmt: off
BOUNDS: dict[str, Bound] = {  # of every flag without choices
    "student":             Text("a folder or a Hub id"),
    "teacher":             MODEL,
    "images":              PATH,
    "prompts":             Text("the name of a set of prompts, or a file"),
    "num_images":          COUNT,
    "seed":                whole(f"[0, {2**63 - 1}]"),  # later pictures have higher ones
    "output_dir":          PATH,
    "batch_size":          whole("[1, 65536]"),
    "num_inference_steps": STEPS,
    "guidance_scale":      GUIDANCE,
    "resolution":          SIDE,
    "max_sequence_length": TOKENS,
    "revision":            REVISION,
    "variant":             VARIANT,
    "reference_data":      PLACE,
    "reference_teacher":   PLACE,
    "feature_weights":     PATH,
    "reward":              Text("a reward's name or path/to/file.py:function"),
}
COMPARE_BOUNDS: dict[str, Bound] = {"a": PATH, "b": PATH, "ignore": FREE_TEXT}
Options = TypeVar("Options", SamplingOptions, MeasuringOptions)


@dataclass(frozen=True)
class Evaluation:
    """A whole command line.

    Args:
        sampling: what is evaluated, and how it is sampled.
        measuring: what it is measured with.
        output_dir: where everything is written.
        arguments: all flags by name, for `evaluation.json`.
    """

    sampling: SamplingOptions
    measuring: MeasuringOptions
    output_dir: Path
    arguments: Mapping[str, Any]


def make_parser() -> Parser:
    """The parser of an evaluation."""
    parser = Parser("rdm-evaluate", description="Measures a student, a teacher or a folder of images.", epilog=EPILOG)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--student", metavar="FOLDER_OR_HUB_ID", help="a LoRA or full student, sampled as it was trained to be")
    add("--teacher", metavar="NAME", help="a stock pipeline: a folder, a Hub id, tiny, tiny-v or tiny-flow")
    add("--images", metavar="FOLDER",
        help="pictures that are there already, in the order of their numbers; the i-th belongs to prompt i")

    add = parser.add_argument
    add("--prompts", help=f"{', '.join(PROMPT_SETS)} (each also =FOLDER, a local copy of the dataset), or a file with "
        "one prompt a line; the tiny teachers' captions by default for them")
    add("--num_images", help="by default one for each prompt, or all pictures of --images")
    add("--seed", default=FIRST_SEED, help="of the first picture; the others have the following ones")
    add("--output_dir", required=True, help="evaluation.json, evaluation.md, contact_sheet.png, images/; a second call "
        "draws only the pictures that are missing")
    add("--batch_size", default=16, help="pictures drawn at once by each process")
    add("--num_inference_steps", help="the student's own by default; 50 for a teacher")
    add("--guidance_scale", help="a teacher's w in u + w (c - u), 1 is off; by default the stock pipeline's")
    add("--solver", choices=SOLVERS, help="a teacher's; by default ddim, or euler for flow matching")
    add("--dtype", default="float32", choices=list(DTYPES), help="of the sampled networks")
    add("--resolution", help="of a teacher's pictures; its own by default")
    add("--max_sequence_length", help="tokens of a prompt that a teacher reads")
    add("--revision", help="of a Hub repository")
    add("--variant", help="of a teacher's files, for example fp16")
    add("--offload", action="store_true", help="only the network that is at work is on the GPU")

    where = "a folder of pictures, statistics (.safetensors of ours, .npz with mu and sigma), or a tiny teacher's name"
    add("--reference_data", metavar="PLACE", help=f"for fd_to_data, the FID: {where}")
    add("--reference_teacher", metavar="PLACE", help=f"for fd_to_teacher, the FID-SD: {where}")
    add("--features", choices=list(FEATURES), help="by default inception, and tiny for the tiny teachers")
    add("--feature_weights", metavar="FILE", help="the Inception weights, where there is no network")
    add("--reward", nargs="*", action="extend", metavar="SPEC",
        help="as in training: name or file.py:function; several, also by repeating the flag")
    add("--reward_dtype", default="float32", choices=list(DTYPES), help="of pretrained rewards' weights")
    set_bounds(parser, BOUNDS)
    return parser
# fmt: on


def parse_args(argv: Sequence[str] | None = None) -> Evaluation:
    """The options of a command line, with their defaults; ends the program with a sentence if one is wrong.

    Raises:
        SystemExit: from argparse.
    """
    parser = make_parser()
    arguments = vars(parser.parse_within(BOUNDS, argv))
    kind: Kind = next(kind for kind in get_args(Kind) if arguments[kind])
    try:
        check(kind, arguments)
        arguments = with_defaults(kind, arguments)
    except ValueError as error:
        parser.error(str(error))
    values = {**arguments, "kind": kind, "name": arguments[kind]}
    sampling, measuring = _pick(SamplingOptions, values), _pick(MeasuringOptions, values)
    return Evaluation(sampling, measuring, Path(arguments["output_dir"]), arguments)


def _pick(options: type[Options], values: Mapping[str, Any]) -> Options:
    return options(**{field.name: values[field.name] for field in fields(options)})


def check(kind: Kind, arguments: Mapping[str, Any]) -> None:
    """Refuses flags that have no effect, and too few pictures. Raises ValueError."""
    if arguments["num_images"] == 1 and (arguments["reference_data"] or arguments["reference_teacher"]):
        raise ValueError("--num_images is 1; a Fréchet distance to a reference needs at least 2 pictures.")
    given = [f"--{name}" for name in OF_TEACHERS if arguments[name] is not None]
    if given and kind != "teacher":
        raise ValueError(f"Only a teacher is sampled with {', '.join(given)}; leave this out.")
    if kind == "images" and arguments["num_inference_steps"]:
        raise ValueError("--num_inference_steps has no effect on existing pictures; leave it out.")


def with_defaults(kind: Kind, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the defaults of a tiny teacher, whose name `tiny` is None for all others.

    Raises:
        ValueError: if prompts are missing, or the student does not exist.
    """
    found = dict(arguments)
    tiny = found["tiny"] = tiny_teacher(kind, found[kind], found["revision"])
    references = [found["reference_data"], found["reference_teacher"]]
    if found["features"] is None:
        found["features"] = "tiny" if tiny or any(place and is_tiny(place) for place in references) else "inception"
    if tiny:
        found["prompts"] = found["prompts"] or tiny
        found["reward"] = list(TINY_REWARDS) if found["reward"] is None else found["reward"]
        if found["features"] == "tiny":
            found["reference_data"] = found["reference_data"] or tiny
            found["reference_teacher"] = found["reference_teacher"] or tiny
    found["reward"] = found["reward"] or []
    if found["prompts"] is None and (found["reward"] or kind != "images"):
        raise ValueError("No prompts: give --prompts, one of " + ", ".join(PROMPT_SETS) + ", or a file.")
    return found


def make_compare_parser() -> Parser:
    """The parser of a comparison."""
    parser = Parser("rdm-evaluate compare", description="Two evaluations side by side.")
    parser.add_argument("a", help="an evaluation.json, or its folder")
    parser.add_argument("b", help="another")
    parser.add_argument("--ignore", nargs="*", default=(), metavar="NAME",
                        help="settings that may differ, for example versions, first_seed, dtype")  # fmt: skip
    return parser
