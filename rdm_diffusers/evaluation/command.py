"""`rdm-evaluate`: draws missing pictures, measures the files, and writes the metrics."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..folders import aside_of
from ..program import run_program
from ..untrusted import without_secrets
from .arguments import COMPARE_BOUNDS, Evaluation, make_compare_parser, parse_args
from .digests import digest_of_texts, sealed
from .given import given_pictures
from .measuring import Measures, digest_of_reward, load_measures, measure_files
from .pictures import contact_sheet, read_image
from .prompt_sets import load_prompt_set
from .records import NOTE, as_markdown, compare, read_json, write_record
from .references import save_reference
from .report import machine
from .sampling import Plan, draw, images_per_second, parent_of, read_record
from .subjects import DRAWING_PACKAGES, installed_versions, load_subject

PATIENCE = timedelta(days=2)  # how long processes wait for the slowest
MEASURING_PACKAGES = ("numpy", "pillow", "torch", "torch-fidelity", "clean-fid")
SHEET = "contact_sheet.png"
MEMORY_ADVICE = "lower --batch_size, or try --offload or --dtype bfloat16"


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
    return evaluate_subject(parse_args(words))


def evaluate_subject(evaluation: Evaluation) -> dict[str, Any] | None:
    """Draws, measures and writes; see `main`."""
    state = make_state()
    sampling, folder = evaluation.sampling, evaluation.output_dir
    prompts = load_prompt_set(sampling.prompts) if sampling.prompts else []
    files: list[Path] = []
    measures = None
    if state.is_main_process:
        check_output(folder)
        if sampling.kind == "images":
            files = given_pictures(Path(sampling.name), prompts, sampling.num_images)
        measures = load_measures(evaluation.measuring, state.device)  # first, so that nothing fails after the drawing
    if sampling.kind == "images":
        drawn_in = parent_of(Path(sampling.name))
    else:
        plan = Plan(folder, prompts, sampling.num_images or len(prompts), sampling.seed)
        draw(plan, load_subject(sampling, state.device), state)
        files, drawn_in = plan.files, folder
    if measures is None:
        return None
    drawn = read_record(drawn_in)
    metrics = measure_files(files, prompts, measures, state.device)
    metrics |= {"nfe": drawn.get("nfe"), "images_per_second": images_per_second(drawn_in)}
    record = sealed(make_record(evaluation, prompts, files, drawn, measures, metrics, state.num_processes))
    contact_sheet(files).save(aside_of(folder / SHEET))
    aside_of(folder / SHEET).replace(folder / SHEET)
    for name, reference in measures.references.items():
        if measures.features is not None:
            save_reference(reference, measures.features, folder / f"reference_{name}.safetensors")
    write_record(folder, record)
    print(as_markdown(record).split("\n\n| setting")[0])
    return record


def check_output(folder: Path) -> None:
    """Makes the output folder.

    Raises:
        ValueError: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written ({error.strerror}); choose another.") from error


def make_state() -> PartialState:
    """This process among the others, on a GPU if there is one.

    Raises:
        ValueError: if the launcher started processes that do not form a group.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    waiting = {"timeout": PATIENCE} if launched > 1 else {}
    state = PartialState(cpu=not torch.cuda.is_available(), **waiting)
    if state.num_processes < launched:
        raise ValueError(
            f"The launcher started {launched} processes, but only {state.num_processes} is in the group; launch with "
            "torchrun --nproc_per_node N -m rdm_diffusers.evaluation, or with accelerate launch --multi_gpu."
        )
    return state


def make_record(
    evaluation: Evaluation,
    prompts: Sequence[str],
    files: Sequence[Path],
    drawn: Mapping[str, Any],
    measures: Measures,
    metrics: Mapping[str, Any],
    num_processes: int,
) -> dict[str, Any]:
    """The content of `evaluation.json`: two evaluations must share `settings`; `context` affects no metric.

    Args:
        evaluation: the command line.
        prompts: of the pictures; empty if unknown.
        files: the pictures.
        drawn: their `images.json`; empty if there is none.
        measures: what they were measured with.
        metrics: the measurements.
        num_processes: how many processes drew.
    """
    is_given, features = evaluation.sampling.kind == "images", measures.features
    subject = drawn or {"kind": "images", "name": str(Path(evaluation.sampling.name).resolve())}
    drawing_versions = drawn.get("versions", {} if is_given else installed_versions(DRAWING_PACKAGES))
    rewards = {weighted.reward.name: digest_of_reward(spec, weighted) for spec, weighted in measures.rewards.items()}
    warnings = [metric["warning"] for name, metric in metrics.items() if name.startswith("fd_") and metric["warning"]]
    arguments = {
        key: without_secrets(value) if isinstance(value, str) else value
        for key, value in evaluation.arguments.items()
        if "token" not in key
    }
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
