"""The student out of a checkpoint: its folder, as the run itself would have written it then."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..families import Conditioning, Teacher, load_denoiser
from ..hub import export_full, export_lora
from ..networks import FAKE_SCORE, STUDENT, TEACHER, Networks, SeparateNetworks, SharedBase
from .arguments import build_parser
from .checkpoints import copy_into, damage, read_arguments, updates_of
from .record import training_record
from .saved_arguments import check_saved
from .setup import load, lora_config, make_scheduler

AVERAGED = "ema"


def read_run(checkpoint: Path) -> argparse.Namespace:
    """The arguments of the run that wrote a checkpoint; the parser's defaults for those that are younger than it.

    Raises:
        ValueError: if the checkpoint is damaged.
    """
    check_saved(checkpoint)
    problem = damage(checkpoint)
    if problem:
        raise ValueError(f"{checkpoint} is damaged ({problem}); export an earlier checkpoint.")
    saved = read_arguments(checkpoint)
    student = saved.get("student", "lora" if "rank" in saved else "full")
    args = argparse.Namespace(**{**vars(build_parser(student=student).parse_args([])), **saved})
    del args.hub_token
    if args.student == "lora" and args.lora_alpha is None:
        args.lora_alpha = args.rank
    return args


def chosen_weights(checkpoint: Path, use_ema: bool | None) -> str:
    """Which of a checkpoint's files the student's weights are in: `ema` or `student`.

    Args:
        checkpoint: its folder.
        use_ema: whether they are to be the moving average; None takes it if there is one.

    Raises:
        ValueError: if it is asked for and there is none.
    """
    found = (checkpoint / f"{AVERAGED}.safetensors").exists()
    if use_ema and not found:
        raise ValueError(f"{checkpoint} has no moving average (its run had --no-use_ema); leave --use_ema out.")
    return AVERAGED if found and use_ema is not False else STUDENT


def export_checkpoint(checkpoint: Path, args: argparse.Namespace, folder: Path, use_ema: bool | None = None) -> None:
    """Writes the student of a checkpoint, as a run does at its end. The base is loaded unquantised.

    Args:
        checkpoint: an undamaged one, of a LoRA run or a full one, on one process or many.
        args: the run's (`read_run`).
        folder: an existing one.
        use_ema: as in `chosen_weights`.

    Raises:
        ValueError: if the weights do not fit the networks that the arguments name.
        WritingError: for example on a full disk.
    """
    file = checkpoint / f"{chosen_weights(checkpoint, use_ema)}.safetensors"
    unquantised = argparse.Namespace(**{**vars(args), "quantization": None})
    teacher = load(unquantised, torch.device("cpu"))
    networks = _make_networks(teacher, args)
    try:
        _fill(networks.parameters(STUDENT), file)
    except (SafetensorError, RuntimeError) as error:
        name = args.pretrained_model_name_or_path
        raise ValueError(f"{file} does not fit {name} ({error}); is that still the teacher of the run?") from error
    averaged = file.stem == AVERAGED
    training = training_record(read_arguments(checkpoint), updates_of(checkpoint), averaged)
    weights, scheduler = networks.student_weights(), make_scheduler(teacher, args.num_student_steps, args.eta)
    if args.student == "lora":
        origin = {"revision": args.revision, "variant": args.variant, "training": training}
        export_lora(folder, teacher, weights, scheduler, **origin)
    else:
        export_full(folder, teacher, weights, teacher.denoiser.config, scheduler, training)


def _make_networks(teacher: Teacher, args: argparse.Namespace) -> Networks:
    """The student's parameters in the order of the run; nothing is sampled with these."""
    common: dict[str, Any] = dict(
        family=teacher.family, schedule=teacher.schedule, prediction_type=teacher.prediction_type,
        null_conditioning=Conditioning({}), guidance_scale=1.0,
    )  # fmt: skip
    if args.student == "lora":
        return SharedBase(teacher.denoiser, lora_config(teacher.family, args), **common)
    student = load_denoiser(args.pretrained_model_name_or_path, torch.float32, args.revision, args.variant)
    return SeparateNetworks({STUDENT: student, FAKE_SCORE: student, TEACHER: nn.Identity()}, **common)


def _fill(parameters: list[nn.Parameter], file: Path) -> None:
    """Copies the numbers of a checkpoint's file into the parameters, in place.

    Raises:
        SafetensorError, RuntimeError: if they are not as many or not of the same shapes.
    """
    prefix = "" if file.stem == AVERAGED else "parameter/"
    with safe_open(file, "pt") as tensors:
        names = {name for name in tensors.keys() if name.startswith(prefix)}  # noqa: SIM118 - no mapping
        if len(names) != len(parameters):
            raise RuntimeError(f"it holds {len(names)} tensors, the network {len(parameters)}")
        for i, parameter in enumerate(parameters):
            copy_into(parameter, tensors.get_tensor(f"{prefix}{i}"))
