"""The student of a checkpoint: its folder, as the run itself would have written it then."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from ..config import RunConfig
from ..config.record import training_record
from ..config.retired import RetiredError
from ..families import Conditioning
from ..hub import export_full, export_lora
from ..networks import STUDENT
from ..untrusted import check_kinds, read_object, real_path
from .assembly import load, load_trained, make_networks, student_scheduler
from .checkpoint_files import RECORD, damage, files_of, read_part, read_record
from .checkpoints import copy_into

AVERAGED = "ema"
REMEDY = "export an earlier checkpoint"


def read_run(checkpoint: Path) -> RunConfig:
    """The configuration of the run that wrote a checkpoint; defaults for settings that are newer than the checkpoint.

    Its record may be anybody's, so it is checked before networks are built after it.

    Raises:
        ValueError: if the checkpoint is damaged, has links out of its folder, or needs an option that this release does
            not have.
    """
    for file in checkpoint.iterdir():
        real_path(checkpoint, file)
    path = checkpoint / RECORD
    record = read_object(path, REMEDY)
    try:
        check_kinds(record, {"arguments": dict, "digests": dict, "update": int})
        config = RunConfig.from_record(record.get("arguments", {}))
    except RetiredError as error:
        raise RetiredError(f"{checkpoint}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({str(error).rstrip('.')}); {REMEDY}.") from error
    problem = damage(checkpoint)
    if problem:
        raise ValueError(f"{checkpoint} is damaged ({problem}); {REMEDY}.")
    return config


def chosen_weights(checkpoint: Path, use_ema: bool | None) -> str:
    """Which part of a checkpoint the student's weights are in: `ema` or `student`.

    Args:
        checkpoint: its folder.
        use_ema: whether to take the moving average; None takes it if there is one.

    Raises:
        ValueError: if it is asked for and there is none.
    """
    has_average = bool(files_of(checkpoint, AVERAGED))
    if use_ema and not has_average:
        raise ValueError(f"{checkpoint} has no moving average (its run had --no-use_ema); leave --use_ema out.")
    return AVERAGED if has_average and use_ema is not False else STUDENT


def export_checkpoint(checkpoint: Path, config: RunConfig, folder: Path, use_ema: bool | None = None) -> None:
    """Writes the student of a checkpoint, as a run does at its end. The base is loaded unquantised.

    Args:
        checkpoint: an undamaged one, of a LoRA run or a full one, on one process or many.
        config: the run's (`read_run`).
        folder: an existing one.
        use_ema: as in `chosen_weights`.

    Raises:
        ValueError: if the weights do not fit the networks that the configuration names.
        WritingError: for example on a full disk.
    """
    chosen = chosen_weights(checkpoint, use_ema)
    config = config.changed("student", quantization=None)
    source = config.teacher
    teacher = load(config, torch.device("cpu"))
    networks = make_networks(  # with the student's parameters in the order of the run; nothing is sampled with these
        config.changed("memory", gradient_checkpointing=False),
        teacher.family,
        teacher.denoiser,
        lru_cache(partial(load_trained, config, teacher)),  # so one network serves as every role
        schedule=teacher.schedule,
        prediction_type=teacher.prediction_type,
        null_conditioning=Conditioning({}),
        guidance_scale=1.0,
    )
    try:
        _fill(networks.parameters(STUDENT), checkpoint, chosen)
    except (SafetensorError, RuntimeError) as error:
        name = source.pretrained_model_name_or_path
        raise ValueError(
            f"{checkpoint / chosen} does not fit {name} ({error}); is that still the teacher of the run?"
        ) from error
    record = read_record(checkpoint)
    training = training_record(record["arguments"], record["update"], chosen == AVERAGED)
    weights, scheduler = networks.student_weights(), student_scheduler(teacher, config)
    if config.is_lora:
        origin = {"revision": source.revision, "variant": source.variant, "training": training}
        export_lora(folder, teacher, weights, scheduler, student_base=config.student_base, **origin)
    else:
        export_full(folder, teacher, weights, teacher.denoiser.config, scheduler, training)


def _fill(parameters: list[nn.Parameter], checkpoint: Path, chosen: str) -> None:
    """Copies a checkpoint's tensors into the parameters; RuntimeError if their number or shapes differ."""
    prefix = "" if chosen == AVERAGED else "parameter/"
    tensors = {name: each for name, each in read_part(checkpoint, chosen).items() if name.startswith(prefix)}
    if len(tensors) != len(parameters):
        raise RuntimeError(f"it holds {len(tensors)} tensors, the network {len(parameters)}")
    for i, parameter in enumerate(parameters):
        copy_into(parameter, tensors[f"{prefix}{i}"])
