"""How a run was launched: one process or many, replicated or sharded; what cannot work is refused here."""

from __future__ import annotations

import os
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from ..config import MemoryConfig, OutputConfig
from ..config.secrecy import words_of_launcher
from ..hardware import uses_cpu
from ..sharding import is_sharded_launch
from .processors import usable_processors
from .tracking import check_trackers

MEMORY_FLAGS = (
    "lower --train_batch_size and raise --gradient_accumulation_steps instead, or try --gradient_checkpointing, "
    "--mixed_precision bf16, --use_8bit_adam, --offload, with FSDP2 --sync_each_batch, or with rewards "
    "--decode_batch_size 1 or --reward_vae; --dry_run shows what a run needs"
)
HOW_TO_LAUNCH = "launch with torchrun --nproc_per_node N, or with accelerate launch --multi_gpu --num_processes N"


def make_accelerator(output: OutputConfig, memory: MemoryConfig) -> Accelerator:
    """The accelerator, on the CPU where there is no GPU; its processes wait for each other as long as `memory` says.

    Raises ValueError if the launcher asks for what a run cannot do, or made one process of several, and ImportError if
    a tracker is not installed.
    """
    check_launch()
    check_trackers(output.report_to)
    project = ProjectConfiguration(output.output_dir, os.path.join(output.output_dir, output.logging_dir))
    accelerator = Accelerator(
        cpu=uses_cpu(),
        mixed_precision="no",  # the networks see to that themselves
        log_with=None if output.report_to == "none" else output.report_to,
        project_config=project,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=memory.ddp_timeout))],
    )
    promised = promised_processes()
    if promised > accelerator.num_processes:
        raise ValueError(
            f"The launcher was asked for {promised} processes and made {accelerator.num_processes}, as accelerate "
            f"launch --cpu does; {HOW_TO_LAUNCH}."
        )
    torch.backends.cuda.matmul.allow_tf32 = memory.allow_tf32
    threads = free_threads(psutil.Process().parent()) if accelerator.device.type == "cpu" else None
    if threads is not None and threads > torch.get_num_threads():
        torch.set_num_threads(threads)
        accelerator.print(f"Each process uses {threads} CPU threads (accelerate launch --num_cpu_threads_per_process).")
    return accelerator


def check_launch() -> None:
    """Raises ValueError for DeepSpeed, Megatron, the first FSDP and its offloading, saying what to use."""
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
    """How many processes the launcher was asked for: in the environment, by `accelerate launch` or its configuration.

    1 if another program started us.
    """
    promised = os.environ.get("WORLD_SIZE")
    if promised:
        return int(promised)
    words = words_of_launcher(psutil.Process().parent())
    if words is None:
        return 1
    asked = launch_command_parser().parse_known_args(words)[0]
    file = asked.config_file or default_config_file
    configured = load_config_from_file(file).num_processes if os.path.isfile(file) else 1
    return int(asked.num_processes or configured)


def free_threads(parent: psutil.Process | None) -> int | None:
    """How many CPU threads each process of this machine can have, if nobody chose: `accelerate launch` gives it one.

    None if somebody did, by a flag of the launcher or by `OMP_NUM_THREADS`, or if another program started us.
    """
    words = words_of_launcher(parent)
    try:
        if parent is None or words is None or "OMP_NUM_THREADS" in parent.environ():
            return None
    except psutil.Error:
        return None
    if launch_command_parser().parse_known_args(words)[0].num_cpu_threads_per_process is not None:
        return None
    return max(1, usable_processors() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
