"""What a run is assembled from, before the loop starts."""

from __future__ import annotations

import argparse
import os

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.training_utils import EMAModel
from peft import LoraConfig

from ..distillation import Draws
from ..families import Teacher
from ..networks import FAKE_SCORE, STUDENT, Networks, SharedBase
from ..schedulers import RdmScheduler
from .arguments import groups_per_update, make_objective
from .checkpoints import TrainState
from .optimizers import make_optimizer
from .prompts import PromptGroups, embed_prompts
from .updates import Distillation

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator, on the CPU where there is no GPU.

    Raises:
        ValueError: if the launcher promised more processes than accelerate made of them.
    """
    project = ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir))
    log_with = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=log_with, project_config=project)
    promised = int(os.environ.get("WORLD_SIZE", "1"))
    if promised != accelerator.num_processes:
        raise ValueError(
            f"The launcher started {promised} processes but accelerate sees {accelerator.num_processes}; launch with "
            "torchrun, or with accelerate launch --multi_gpu."
        )
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


def make_scheduler(teacher: Teacher, args: argparse.Namespace) -> RdmScheduler:
    """The student's sampler, trained on the very grid that the exported stock scheduler will lay."""
    stock = teacher.family.stock_scheduler(teacher.pipeline.scheduler, args.num_student_steps, args.eta)
    stock.set_timesteps(args.num_student_steps)
    if teacher.schedule.is_flow:
        grid = {"student_sigmas": stock.sigmas[:-1].tolist()}
    else:
        grid = {"student_timesteps": stock.timesteps.tolist()}
    config = {**teacher.pipeline.scheduler.config, "timestep_spacing": "trailing", "steps_offset": 0}
    return RdmScheduler.from_config(config, eta=args.eta, **grid)


def make_networks(teacher: Teacher, args: argparse.Namespace) -> SharedBase:
    """The three roles on the teacher's own network, with fresh LoRAs drawn from the seed."""
    if args.gradient_checkpointing:
        teacher.denoiser.enable_gradient_checkpointing()
    layers = args.lora_layers.split(",") if args.lora_layers else list(teacher.family.lora_target_modules)
    config = LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=layers, init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        return SharedBase(
            teacher.denoiser,
            config,
            args.fold_adapters,
            teacher.family,
            teacher.schedule,
            teacher.prediction_type,
            teacher.family.encode_prompts(teacher.pipeline, [""]),
            args.guidance_scale,
        )


def make_distillation(
    teacher: Teacher, networks: Networks, prompts: list[str], args: argparse.Namespace, accelerator: Accelerator
) -> Distillation:
    """Gathers what stays the same through a run; encodes the prompts, or finds them cached."""
    draws = Draws(args.seed, args.group_size, accelerator.device)
    with accelerator.main_process_first():
        embeddings = embed_prompts(teacher, prompts, args.cache_dir)
    return Distillation(
        networks=networks,
        scheduler=make_scheduler(teacher, args),
        objective=make_objective(args),
        prompts=PromptGroups(prompts, embeddings, draws, DTYPES[args.mixed_precision]),
        draws=draws,
        latent_shape=teacher.family.latent_shape(teacher.pipeline, args.resolution),
        groups_per_update=groups_per_update(args),
        steps_per_rollout=args.steps_per_rollout,
        micro_batch_size=args.train_batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def make_state(networks: Networks, args: argparse.Namespace) -> TrainState:
    """Optimisers for student and fake score, and the student's moving average."""
    rates = {STUDENT: args.learning_rate, FAKE_SCORE: args.fake_learning_rate}
    optimizers = {role: make_optimizer(networks.parameters(role), rate, args) for role, rate in rates.items()}
    ema = EMAModel(networks.parameters(STUDENT), decay=args.ema_decay) if args.use_ema else None
    return TrainState(optimizers, ema)
