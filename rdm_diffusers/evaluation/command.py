"""`rdm-evaluate`: draws what is missing, measures the files, and writes what was found."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..credentials import without_secrets
from ..folders import aside_of
from ..program import run_program
from ..rewards import WeightedReward, load_reward
from .arguments import COMPARE_BOUNDS, make_compare_parser, parse_args
from .batches import images_per_second
from .digests import SAMPLED, digest_of_files, digest_of_tensors, digest_of_texts
from .features import Features, load_features
from .image_files import damaged, list_images, read_image
from .measuring import measure_accuracy, measure_distances, measure_reward
from .pairing import as_paired, pair
from .pictures import contact_sheet
from .prompt_sets import load_prompt_set, prompts_for
from .records import NOTE, as_markdown, compare, read_json, write_record
from .references import Reference, load_reference, save_reference
from .report import machine
from .sampling import Plan, beside, changed, draw, read_record
from .sealing import sealed
from .subjects import DRAWING, DTYPES, load_subject, versions

PATIENCE = timedelta(days=2)  # processes that have drawn their share wait for the slowest
MEASURING = ("numpy", "pillow", "torch", "torch-fidelity", "clean-fid")
SHEET = "contact_sheet.png"
MEMORY_ADVICE = "lower --batch_size, or try --offload or --dtype bfloat16"


@dataclass(frozen=True)
class Measures:
    """What pictures are measured with.

    Args:
        features: None if there is no reference.
        references: by `data` and `teacher`.
        rewards: by their specifications.
    """

    features: Features | None
    references: Mapping[str, Reference]
    rewards: Mapping[str, WeightedReward]


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Evaluates, or compares two evaluations.

    Args:
        argv: the command line; that of the program by default.

    Returns:
        What `evaluation.json` holds, in the first process; None in others and after a comparison.

    Raises:
        ValueError, ImportError: one sentence on what is wrong and what to do.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["compare"]:
        args = make_compare_parser().parse_within(COMPARE_BOUNDS, words[1:])
        print(compare(read_json(Path(args.a)), read_json(Path(args.b)), args.ignore))
        return None
    return evaluate_subject(parse_args(words))


def evaluate_subject(args: argparse.Namespace) -> dict[str, Any] | None:
    """Draws, measures and writes; see `main`."""
    state = make_state()
    folder = Path(args.output_dir)
    prompts = load_prompt_set(args.prompts) if args.prompts else []
    if state.is_main_process:
        check_output(folder)
    given = given_images(args, prompts) if args.images and state.is_main_process else []
    measures = load_measures(args, state.device) if state.is_main_process else None
    if args.images:
        files, source = given, beside(Path(args.images))
    else:
        files, source = drawn_images(args, prompts, state), folder
    if measures is None:
        return None
    metrics = measure(files, prompts, measures, source, state.device)
    record = sealed(as_record(args, prompts, files, source, measures, metrics, state))
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
    """This process among the others, on a GPU where there is one.

    Raises:
        ValueError: if the launcher made processes that do not know of each other.
    """
    several = int(os.environ.get("WORLD_SIZE", "1"))
    waiting = {"timeout": PATIENCE} if several > 1 else {}
    state = PartialState(cpu=not torch.cuda.is_available(), **waiting)
    if state.num_processes < several:
        raise ValueError(
            f"The launcher started {several} processes and {state.num_processes} is known; launch with torchrun "
            "--nproc_per_node N -m rdm_diffusers.evaluation, or with accelerate launch --multi_gpu."
        )
    return state


def load_measures(args: argparse.Namespace, device: torch.device) -> Measures:
    """Features, references and rewards, all before the first picture is drawn.

    Raises:
        ValueError, ImportError: if one cannot be had.
    """
    rewards = {spec: load_reward(spec, device, DTYPES[args.reward_dtype]) for spec in args.reward}
    names = [weighted.reward.name for weighted in rewards.values()]
    if len(set(names)) < len(args.reward):
        raise ValueError(f"Two of the rewards {', '.join(args.reward)} have one name; name each once.")
    places = {"data": args.reference_data, "teacher": args.reference_teacher}
    places = {kind: place for kind, place in places.items() if place}
    features = load_features(args.features, args.feature_weights, device) if places else None
    if features is None:
        return Measures(None, {}, rewards)
    references = {kind: load_reference(place, kind, features, device) for kind, place in places.items()}
    return Measures(features, references, rewards)


def given_images(args: argparse.Namespace, prompts: Sequence[str]) -> list[Path]:
    """The pictures of `--images`, in the order of their prompts; says how they are paired.

    Raises:
        ValueError: if there are too few, if they were drawn for other prompts, if it is open which prompt one belongs
            to, or if one is damaged.
    """
    files = list_images(Path(args.images))
    if args.num_images and args.num_images > len(files):
        raise ValueError(f"{args.images} holds {len(files)} pictures, not {args.num_images}; lower --num_images.")
    drawn_for = read_record(beside(Path(args.images))).get("prompts_sha256")
    if prompts and drawn_for not in (None, digest_of_texts(prompts)):
        raise ValueError(
            f"The pictures in {args.images} were drawn for other prompts than {args.prompts}; give theirs."
        )
    files = pair(files, prompts, args.num_images)
    useless = damaged(files)
    if useless:
        raise ValueError(f"{len(useless)} of {len(files)} pictures are damaged: {min(useless.values())}")
    others = changed(files)
    if others:
        raise ValueError(f"The picture {others[0]} was changed since it was drawn; remove it and draw it again.")
    if prompts:
        print(as_paired(files, prompts))
    return files


def drawn_images(args: argparse.Namespace, prompts: Sequence[str], state: PartialState) -> list[Path]:
    """The pictures of the student or teacher; those that are missing are drawn."""
    plan = Plan(Path(args.output_dir), prompts, args.num_images or len(prompts), args.seed)
    draw(plan, load_subject(args, state.device), state)
    return plan.files


def measure(
    files: Sequence[Path], prompts: Sequence[str], measures: Measures, source: Path, device: torch.device
) -> dict[str, Any]:
    """All numbers of the pictures; `source` holds `images.json` and the speeds, if any."""
    asked = prompts_for(prompts, range(len(files))) if prompts else []
    metrics: dict[str, Any] = {"num_images": len(files)}
    if measures.features is not None:
        metrics |= measure_distances(files, measures.features, measures.references, len(prompts) or None, device)
        if measures.features.name == "tiny" and asked:
            metrics["prompt_accuracy"] = measure_accuracy(files, asked)
    metrics["rewards"] = {
        weighted.reward.name: measure_reward(files, asked, weighted.reward, device)
        for weighted in measures.rewards.values()
    }
    return {**metrics, "nfe": read_record(source).get("nfe"), "images_per_second": images_per_second(source)}


def as_record(
    args: argparse.Namespace,
    prompts: Sequence[str],
    files: Sequence[Path],
    source: Path,
    measures: Measures,
    metrics: Mapping[str, Any],
    state: PartialState,
) -> dict[str, Any]:
    """What `evaluation.json` holds: `settings` are what two evaluations must share, `context` moves no number."""
    drawn = read_record(source)
    given = {"kind": "images", "name": str(Path(args.images or args.output_dir).resolve())}
    subject = {key: value for key, value in (drawn or given).items() if key not in ("versions", "dtype", "first_seed")}
    distances = [value for name, value in metrics.items() if name.startswith("fd_")]
    settings = {
        "num_images": len(files),
        "first_seed": drawn.get("first_seed"),
        "dtype": drawn.get("dtype"),
        "image_size": list(read_image(files[0]).shape[1:]),
        "prompts": {"sha256": digest_of_texts(prompts), "count": len(prompts)} if prompts else None,
        "features": None if measures.features is None else measures.features.as_dict(),
        "reference": {name: reference.as_dict() for name, reference in measures.references.items()},
        "rewards": {weighted.reward.name: digest_of_reward(spec, weighted)
                    for spec, weighted in measures.rewards.items()},
        "versions": {**versions(MEASURING), **drawn.get("versions", versions(DRAWING) if not args.images else {})},
    }  # fmt: skip
    return {
        "subject": subject,
        "settings": settings,
        "metrics": metrics,
        "notes": [NOTE, *dict.fromkeys(one["warning"] for one in distances if one["warning"])],
        "context": {
            "arguments": {
                key: without_secrets(value) if isinstance(value, str) else value
                for key, value in vars(args).items()
                if "token" not in key
            },
            "references": {name: reference.source for name, reference in measures.references.items()},
            "processes": state.num_processes,
            "machine": machine(),
        },
    }


def digest_of_reward(spec: str, weighted: WeightedReward) -> str:
    """Tells rewards of one name apart: by some numbers of each of their tensors, and by the file that they are in."""
    reward = weighted.reward
    networks = [part for part in (reward, getattr(reward, "function", None)) if isinstance(part, torch.nn.Module)]
    parts = [digest_of_tensors(network.state_dict(), SAMPLED) for network in networks]
    file = Path(spec.split(":")[0]).expanduser()
    parts += [digest_of_files([file])] if file.suffix == ".py" else []
    return digest_of_texts(parts) if parts else "built in"


def run() -> None:
    """The console script: `main`, with its errors as one line."""
    try:
        run_program(main, MEMORY_ADVICE)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
