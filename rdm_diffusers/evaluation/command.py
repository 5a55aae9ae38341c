"""`rdm-evaluate`: draws missing pictures, measures the files, and writes the metrics."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..bounds import (
    COUNT,
    FREE_TEXT,
    GUIDANCE,
    MODEL,
    PATH,
    REVISION,
    STEPS,
    TOKENS,
    VARIANT,
    Bound,
    Parser,
    Text,
    set_bounds,
    whole,
)
from ..folders import aside_of
from ..hardware import uses_cpu
from ..pipelines import StudentConfig
from ..program import run_program
from ..sizes import RESOLUTION
from ..tiny import is_tiny
from ..tiny.domains import MEASURED_REWARDS, domain_of
from ..untrusted import without_secrets
from .features import FEATURES, save_reference
from .measuring import Measures, digest_of_reward, load_measures, measure_files
from .pictures import contact_sheet, read_image
from .prompt_sets import PROMPT_SETS, load_prompt_set
from .records import NOTE, as_markdown, compare, digest_of_texts, read_json, sealed, write_record
from .report import machine
from .sampling import Plan, draw, given_pictures, images_per_second, parent_of, read_record
from .subjects import DRAWING_PACKAGES, DTYPES, FLOW_SOLVERS, TEACHER_SOLVERS, Options, installed_versions, load_subject

FIRST_SEED = 1_000_000  # far from the seeds of the tiny teachers' references
SOLVERS = tuple(dict.fromkeys([*TEACHER_SOLVERS, *FLOW_SOLVERS]))
OF_TEACHERS = ("guidance_scale", "solver", "max_sequence_length", "variant", "single_file_config")
PATIENCE = timedelta(days=2)  # how long processes wait for the slowest
MEASURING_PACKAGES = ("numpy", "pillow", "torch", "torch-fidelity", "clean-fid")
SHEET = "contact_sheet.png"
MEMORY_ADVICE = "lower --batch_size, or try --offload or --dtype bfloat16"
EPILOG = "Two results side by side: rdm-evaluate compare a.json b.json"
PLACE = Text("a folder, a file, or a tiny teacher's name")
# fmt: off
BOUNDS: dict[str, Bound] = {  # of every flag without choices
    **dict.fromkeys(("student", "single_file_config"), Text("a folder or a Hub id")),
    "teacher":             MODEL,
    "images":              PATH,
    "prompts":             Text("the name of a set of prompts, or a file"),
    "num_images":          COUNT,
    "seed":                whole(f"[0, {2**63 - 1}]"),  # later pictures have higher ones
    "output_dir":          PATH,
    "batch_size":          whole("[1, 65536]"),
    "num_inference_steps": STEPS,
    "guidance_scale":      GUIDANCE,
    "resolution":          RESOLUTION,
    "max_sequence_length": TOKENS,
    "revision":            REVISION,
    "variant":             VARIANT,
    **dict.fromkeys(("reference_data", "reference_teacher"), PLACE),
    "feature_weights":     PATH,
    "reward":              Text("a reward's name, path/to/file.py:function or http://host:port/path"),
}
COMPARE_BOUNDS: dict[str, Bound] = {"a": PATH, "b": PATH, "ignore": FREE_TEXT}


def make_parser() -> Parser:
    """The parser of an evaluation, whose flags are the fields of `Options` in their order."""
    parser = Parser("rdm-evaluate", description="Measures a student, a teacher or a folder of images.", epilog=EPILOG)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--student", metavar="FOLDER_OR_HUB_ID", help="a LoRA or full student, sampled as it was trained to be")
    add("--teacher", metavar="NAME", help="a stock pipeline: a folder, a file, a Hub id, or a tiny teacher's name")
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
    add("--resolution", help="of the pictures, 1024 or 1216x832, width x height; the student's or teacher's by default")
    add("--max_sequence_length", help="tokens of a prompt that a teacher reads")
    add("--revision", help="of a Hub repository")
    add("--variant", help="of a teacher's files, for example fp16")
    add("--single_file_config", help="of a teacher that is a single file, as in training")
    add("--offload", action="store_true", help="only the network that is at work is on the GPU")

    where = "a folder of pictures, statistics (.safetensors of ours, .npz with mu and sigma), or a tiny teacher's name"
    add("--reference_data", metavar="PLACE", help=f"for fd_to_data, the FID: {where}")
    add("--reference_teacher", metavar="PLACE", help=f"for fd_to_teacher, the FID-SD: {where}")
    add("--features", choices=list(FEATURES), help="by default inception, and a tiny teacher's own for it")
    add("--feature_weights", metavar="FILE", help="the Inception weights, where there is no network")
    add("--reward", nargs="*", action="extend", metavar="SPEC",
        help="as in training: name, file.py:function or http://host:port/path; several, also by repeating the flag")
    add("--reward_dtype", default="float32", choices=list(DTYPES), help="of pretrained rewards' weights")
    set_bounds(parser, BOUNDS)
    return parser
# fmt: on


def make_compare_parser() -> Parser:
    """The parser of a comparison."""
    parser = Parser("rdm-evaluate compare", description="Two evaluations side by side.")
    parser.add_argument("a", help="an evaluation.json, or its folder")
    parser.add_argument("b", help="another")
    parser.add_argument("--ignore", nargs="*", default=(), metavar="NAME",
                        help="settings that may differ, for example versions, first_seed, dtype")  # fmt: skip
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Options:
    """The options of a command line; ends the program with a sentence if one is wrong."""
    parser = make_parser()
    arguments = vars(parser.parse_within(BOUNDS, argv))
    try:
        _check(arguments)
        return _with_defaults(arguments)
    except ValueError as error:
        parser.error(str(error))


def _check(arguments: Mapping[str, Any]) -> None:
    """Refuses flags that have no effect, and too few pictures."""
    if arguments["num_images"] == 1 and (arguments["reference_data"] or arguments["reference_teacher"]):
        raise ValueError("--num_images is 1; a Fréchet distance to a reference needs at least 2 pictures.")
    given = [f"--{name}" for name in OF_TEACHERS if arguments[name] is not None]
    if given and not arguments["teacher"]:
        raise ValueError(f"Only a teacher is sampled with {', '.join(given)}; leave this out.")
    if arguments["images"] and (arguments["num_inference_steps"] or arguments["resolution"]):
        raise ValueError("--num_inference_steps and --resolution have no effect on existing pictures; leave them out.")


def _with_defaults(arguments: Mapping[str, Any]) -> Options:
    """The options with the defaults of a tiny teacher; ValueError without prompts, or if there is no such student."""
    found = dict(arguments)
    teacher = found["teacher"]
    if found["student"]:
        hub = {"revision": found["revision"]} if found["revision"] else {}
        teacher = StudentConfig.load(found["student"], **hub).base_model_name_or_path
    tiny = found["tiny"] = teacher if teacher and is_tiny(teacher) else None
    if found["features"] is None:
        places = (tiny, found["reference_data"], found["reference_teacher"])
        found["features"] = next((domain_of(place).name for place in places if place and is_tiny(place)), "inception")
    if tiny:
        found["prompts"] = found["prompts"] or tiny
        found["reward"] = list(MEASURED_REWARDS) if found["reward"] is None else found["reward"]
        if found["features"] == domain_of(tiny).name:
            found["reference_data"] = found["reference_data"] or tiny
            found["reference_teacher"] = found["reference_teacher"] or tiny
    found["reward"] = found["reward"] or []
    if found["prompts"] is None and (found["reward"] or not found["images"]):
        raise ValueError("No prompts: give --prompts, one of " + ", ".join(PROMPT_SETS) + ", or a file.")
    return Options(**found)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Evaluates, or compares two evaluations.

    Args:
        argv: the command line; that of the program by default.

    Returns:
        The content of `evaluation.json` in the first process; None in other processes and after a comparison.

    Raises:
        ValueError, ImportError: one sentence on what is wrong and what to do.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["compare"]:
        args = make_compare_parser().parse_within(COMPARE_BOUNDS, words[1:])
        print(compare(read_json(Path(args.a)), read_json(Path(args.b)), args.ignore))
        return None
    return _evaluate(parse_args(words))


def _evaluate(options: Options) -> dict[str, Any] | None:
    state, folder = _make_state(), Path(options.output_dir)
    prompts = load_prompt_set(options.prompts) if options.prompts else []
    files: list[Path] = []
    measures = None
    if state.is_main_process:
        _check_output(folder)
        if options.images:
            files = given_pictures(Path(options.images), prompts, options.num_images)
        measures = load_measures(options, state.device)  # first, so that nothing fails after the drawing
    if options.images:
        drawn_in = parent_of(Path(options.images))
    else:
        plan = Plan(folder, prompts, options.num_images or len(prompts), options.seed)
        draw(plan, *load_subject(options, state.device), state)
        files, drawn_in = plan.files, folder
    if measures is None:
        return None
    drawn = read_record(drawn_in)
    metrics = measure_files(files, prompts, measures, state.device)
    metrics |= {"nfe": drawn.get("nfe"), "images_per_second": images_per_second(drawn_in)}
    record = sealed(_make_record(options, prompts, files, drawn, measures, metrics, state.num_processes))
    contact_sheet(files).save(aside_of(folder / SHEET))
    aside_of(folder / SHEET).replace(folder / SHEET)
    for name, reference in measures.references.items():
        if measures.features is not None:
            save_reference(reference, measures.features, folder / f"reference_{name}.safetensors")
    write_record(folder, record)
    print(as_markdown(record).split("\n\n| setting")[0])
    return record


def _check_output(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written ({error.strerror}); choose another.") from error


def _make_state() -> PartialState:
    """This process among the others, on a GPU if there is one; ValueError if a launcher's processes form no group."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    state = PartialState(cpu=uses_cpu(), **({"timeout": PATIENCE} if launched > 1 else {}))
    if state.num_processes < launched:
        raise ValueError(
            f"The launcher started {launched} processes, but only {state.num_processes} is in the group; launch with "
            "torchrun --nproc_per_node N -m rdm_diffusers.evaluation, or with accelerate launch --multi_gpu."
        )
    return state


def _make_record(
    options: Options,
    prompts: Sequence[str],
    files: Sequence[Path],
    drawn: Mapping[str, Any],
    measures: Measures,
    metrics: Mapping[str, Any],
    num_processes: int,
) -> dict[str, Any]:
    """The content of `evaluation.json`: two evaluations must share `settings`; `context` affects no metric.

    `drawn` is the pictures' `images.json`, empty if there is none; `prompts` are empty if unknown.
    """
    features = measures.features
    subject = drawn or {"kind": "images", "name": str(Path(options.name).resolve())}
    drawing_versions = drawn.get("versions", {} if options.images else installed_versions(DRAWING_PACKAGES))
    rewards = {weighted.reward.name: digest_of_reward(spec, weighted) for spec, weighted in measures.rewards.items()}
    warnings = [metric["warning"] for name, metric in metrics.items() if name.startswith("fd_") and metric["warning"]]
    arguments = {k: without_secrets(v) if isinstance(v, str) else v for k, v in asdict(options).items()}
    return {
        "subject": {key: value for key, value in subject.items() if key not in ("versions", "dtype", "first_seed")},
        "settings": {
            "num_images": len(files),
            "first_seed": drawn.get("first_seed"),
            "dtype": drawn.get("dtype"),
            "image_size": list(read_image(files[0]).shape[1:]),
            "prompts": {"sha256": digest_of_texts(prompts), "count": len(prompts)} if prompts else None,
            "features": None if features is None else features.as_dict(),
            "reference": {name: reference.as_dict() for name, reference in measures.references.items()},
            "rewards": rewards,
            "versions": {**installed_versions(MEASURING_PACKAGES), **drawing_versions},
        },
        "metrics": metrics,
        "notes": [NOTE, *dict.fromkeys(warnings)],
        "context": {
            "arguments": arguments,
            "references": {name: reference.source for name, reference in measures.references.items()},
            "processes": num_processes,
            "machine": machine(),
        },
    }


def run() -> None:
    """The console script: `main`, with its errors as one line."""
    try:
        run_program(main, MEMORY_ADVICE)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
