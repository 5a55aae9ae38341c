"""The command line of `rdm-evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

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
    Text,
    whole,
)  # fmt: skip
from ..parsing import Parser, set_bounds
from ..tiny import is_tiny
from .features import FEATURES
from .prompt_sets import PROMPT_SETS
from .samplers import FLOW_SOLVERS, TEACHER_SOLVERS
from .subjects import DTYPES, tiny_teacher

FIRST_SEED = 1_000_000  # far from the seeds behind the tiny teachers' references
TINY_REWARDS = ("tiny_prompt", "tiny_bold")
SOLVERS = tuple(dict.fromkeys([*TEACHER_SOLVERS, *FLOW_SOLVERS]))
EPILOG = "Two results side by side: rdm-evaluate compare a.json b.json"

PLACE = Text("a folder, a file, or a tiny teacher's name")
# fmt: off
BOUNDS: dict[str, Bound] = {  # what each flag takes, but for those whose choices the parser itself names
    "student":             Text("a folder or a Hub id"),
    "teacher":             MODEL,
    "images":              PATH,
    "prompts":             Text("the name of a set of prompts, or a file"),
    "num_images":          COUNT,
    "seed":                whole(f"[0, {2**63 - 1}]"),  # the pictures' own ones follow it
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
# fmt: on


def make_parser() -> Parser:
    """What an evaluation takes."""
    parser = Parser("rdm-evaluate", description="Measures a student, a teacher or a folder of images.", epilog=EPILOG)
    _add_subject(parser.add_mutually_exclusive_group(required=True).add_argument)
    _add_sampling(parser.add_argument)
    _add_measuring(parser.add_argument)
    set_bounds(parser, BOUNDS)
    return parser


def _add_subject(add) -> None:
    add("--student", metavar="FOLDER_OR_HUB_ID", help="a LoRA or full student, sampled as it was trained to be")
    add("--teacher", metavar="NAME", help="a stock pipeline: a folder, a Hub id, tiny, tiny-v or tiny-flow")
    add(
        "--images",
        metavar="FOLDER",
        help="pictures that are there already, in the order of their numbers; the i-th belongs to prompt i",
    )


def _add_sampling(add) -> None:
    add("--prompts", help=f"{', '.join(PROMPT_SETS)} (each also =FOLDER, a local copy of the dataset), or a file with "
        "one prompt a line; the tiny teachers' captions by default for them")  # fmt: skip
    add("--num_images", help="by default one for each prompt, or all pictures of --images")
    add("--seed", default=FIRST_SEED, help="of the first picture; the others have the following ones")
    add("--output_dir", required=True, help="evaluation.json, evaluation.md, contact_sheet.png, images/; a second call "
        "draws only the pictures that are missing")  # fmt: skip
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


def _add_measuring(add) -> None:
    where = "a folder of pictures, statistics (.safetensors of ours, .npz with mu and sigma), or a tiny teacher's name"
    add("--reference_data", metavar="PLACE", help=f"for fd_to_data, the FID: {where}")
    add("--reference_teacher", metavar="PLACE", help=f"for fd_to_teacher, the FID-SD: {where}")
    add("--features", choices=list(FEATURES), help="by default inception, and tiny for the tiny teachers")
    add("--feature_weights", metavar="FILE", help="the Inception weights, where there is no network")
    add("--reward", nargs="*", action="extend", metavar="SPEC",
        help="as in training: name or file.py:function; several, also by repeating the flag")  # fmt: skip
    add("--reward_dtype", default="float32", choices=list(DTYPES), help="of pretrained rewards' weights")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, those that depend on others filled in; ends the program with a sentence if they cannot be.

    Raises:
        SystemExit: from argparse.
    """
    parser = make_parser()
    args = parser.parse_within(BOUNDS, argv)
    try:
        check(args)
        fill_in(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Refuses flags that have no effect, and too few pictures. Raises ValueError."""
    if args.num_images == 1 and (args.reference_data or args.reference_teacher):
        raise ValueError("--num_images is 1; a Fréchet distance to a reference needs at least 2 pictures.")
    of_teachers = ("guidance_scale", "solver", "resolution", "max_sequence_length", "variant")
    given = [f"--{name}" for name in of_teachers if getattr(args, name) is not None]
    if given and not args.teacher:
        raise ValueError(f"{', '.join(given)} are a teacher's; a student is sampled as it was trained. Leave them out.")
    if args.images and args.num_inference_steps:
        raise ValueError("--num_inference_steps has no effect on pictures that are there already; leave it out.")


def fill_in(args: argparse.Namespace) -> None:
    """Fills in what the tiny teachers have by default; `args.tiny` is the one's name, or None.

    Raises:
        ValueError: if prompts are missing, or the student cannot be found.
    """
    args.tiny = tiny_teacher(args)
    own = args.tiny or any(is_tiny(place) for place in (args.reference_data, args.reference_teacher) if place)
    args.features = args.features or ("tiny" if own else "inception")
    if args.tiny:
        args.prompts = args.prompts or args.tiny
        args.reward = list(TINY_REWARDS) if args.reward is None else args.reward
        if args.features == "tiny":
            args.reference_data = args.reference_data or args.tiny
            args.reference_teacher = args.reference_teacher or args.tiny
    args.reward = args.reward or []
    if args.prompts is None and (args.reward or not args.images):
        raise ValueError("No prompts: give --prompts, one of " + ", ".join(PROMPT_SETS) + ", or a file.")


def make_compare_parser() -> Parser:
    """What a comparison takes."""
    parser = Parser("rdm-evaluate compare", description="Two evaluations side by side.")
    parser.add_argument("a", help="an evaluation.json, or its folder")
    parser.add_argument("b", help="another")
    parser.add_argument("--ignore", nargs="*", default=(), metavar="NAME",
                        help="settings that may differ, for example versions, first_seed, dtype")  # fmt: skip
    return parser
