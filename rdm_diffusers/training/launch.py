"""How a run was launched: one process or many, replicated or sharded; what cannot work is refused here."""

from __future__ import annotations

import argparse
import os

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration

from .secrecy import launch_words

MEMORY_FLAGS = (
    "lower --train_batch_size and raise --gradient_accumulation_steps instead, or try --gradient_checkpointing, "
    "--mixed_precision bf16, --use_8bit_adam or --offload; --dry_run shows what a run needs"
)
HOW_TO_LAUNCH = "launch with torchrun --nproc_per_node N, or with accelerate launch --multi_gpu --num_processes N"


def is_sharded_launch() -> bool:
    """Whether `accelerate launch` was told to use FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator, on the CPU where there is no GPU.

    Raises:
        ValueError: if the launcher asks for what a run cannot do, or made one process of several.
        ImportError: if a tracker that shall log is not installed.
    """
    check_launch()
    check_trackers(args.report_to)
    project = ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir))
    log_with = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # the networks see to that themselves
        log_with=log_with,
        project_config=project,
    )
    promised = promised_processes()
    if promised > accelerator.num_processes:
        raise ValueError(
            f"The launcher was asked for {promised} processes and made {accelerator.num_processes}, as accelerate "
            f"launch --cpu does; {HOW_TO_LAUNCH}."
        )
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


def check_trackers(report_to: str) -> None:
    """Refuses a tracker that accelerate would leave out without a word.

    Raises:
        ImportError: if its package is missing.
    """
    installed = [str(one) for one in get_available_trackers()]
    if report_to == "none" or report_to in installed or (report_to == "all" and installed):
        return
    raise ImportError(
        f"--report_to {report_to} needs a package that is not installed, so that the run would have no logs: "
        "pip install 'rdm-diffusers[track]' or the tracker's own, or leave the logs out with --report_to none."
    )


def check_launch() -> None:
    """Refuses the launchers' engines that a run cannot use.

    Raises:
        ValueError: for DeepSpeed, Megatron, the first FSDP and its offloading, saying what to use.
    """
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            raise ValueError(
                f"{engine} keeps one model in an engine of its own, and a run trains two by turns; to spread the "
                "weights over devices use FSDP2 instead: accelerate launch --use_fsdp --fsdp_version 2."
            )
    if is_sharded_launch() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "FSDP 1 flattens frozen and trained weights together; add --fsdp_version 2 to accelerate launch, or "
            "fsdp_version: 2 to its configuration."
        )
    if is_sharded_launch() and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ValueError("FSDP's offloading of parameters is not supported; leave --fsdp_offload_params out.")


def promised_processes() -> int:
    """How many processes the launcher was asked for: its environment's word, or that of our parent's command line."""
    promised = os.environ.get("WORLD_SIZE")
    return int(promised) if promised else _asked_of_accelerate(psutil.Process().parent())


def _asked_of_accelerate(parent: psutil.Process | None) -> int:
    """What `accelerate launch --num_processes` or its configuration says; 1 if another program started us."""
    try:
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return 1
    given = launch_words(words)
    if given is None:
        return 1
    asked = launch_command_parser().parse_known_args(given)[0]
    file = asked.config_file or default_config_file
    configured = load_config_from_file(file).num_processes if os.path.isfile(file) else 1
    return int(asked.num_processes or configured)
