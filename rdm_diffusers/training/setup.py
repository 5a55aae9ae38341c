"""What a run is assembled from, before the loop starts."""

from __future__ import annotations

import argparse
import os
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.training_utils import EMAModel
from peft import LoraConfig

from ..distillation import GNDMR, Draws, RunningMeans
from ..families import Family, PromptOptions, Teacher, check_lora
from ..networks import FAKE_SCORE, STUDENT, Networks, SharedBase
from ..rewards import WeightedReward, load_reward
from ..schedulers import RdmScheduler
from .arguments import groups_per_update, make_objective
from .checkpoints import TrainState
from .external_rewards import ExternalRewards
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


def prompt_options(args: argparse.Namespace) -> PromptOptions:
    """How the arguments want prompts to be read."""
    return PromptOptions(args.max_sequence_length, args.resolution, args.guidance_scale)


def make_scheduler(teacher: Teacher, args: argparse.Namespace) -> RdmScheduler:
    """The student's sampler, trained on the very grid that the exported stock scheduler will lay."""
    stock = teacher.family.stock_scheduler(teacher.pipeline.scheduler, args.num_student_steps, args.eta)
    stock.set_timesteps(args.num_student_steps)
    if teacher.schedule.is_flow:
        grid = {"student_sigmas": stock.sigmas[:-1].tolist()}
    else:
        grid = {"student_timesteps": stock.timesteps.tolist()}
    config = {**teacher.pipeline.scheduler.config, "timestep_spacing": "trailing", "steps_offset": 0}
    return RdmScheduler.from_config(config, prediction_type=teacher.prediction_type, eta=args.eta, **grid)


def lora_config(family: Family, args: argparse.Namespace) -> LoraConfig:
    """The shape of both LoRAs."""
    layers = args.lora_layers.split(",") if args.lora_layers else list(family.lora_target_modules)
    return LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=layers, init_lora_weights="gaussian")


def make_networks(teacher: Teacher, args: argparse.Namespace) -> SharedBase:
    """The three roles on the teacher's own network, with fresh LoRAs drawn from the seed.

    Raises:
        ValueError: if the teacher's stock pipeline could not load them.
    """
    check_lora(teacher.family)
    if args.gradient_checkpointing:
        teacher.denoiser.enable_gradient_checkpointing()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        networks = SharedBase(
            teacher.denoiser,
            lora_config(teacher.family, args),
            args.fold_adapters,
            teacher.family,
            teacher.schedule,
            teacher.prediction_type,
            teacher.encode_nothing(),
            1.0 if teacher.family.embeds_guidance(teacher.pipeline) else args.guidance_scale,
        )
    if args.fake_score_steps:
        time_embedding = teacher.denoiser.get_submodule(teacher.family.time_embedding_name)
        networks.tell_steps(time_embedding, args.num_student_steps)
    return networks


def make_distillation(
    teacher: Teacher,
    networks: Networks,
    prompts: list[str],
    rewards: list[WeightedReward],
    args: argparse.Namespace,
    accelerator: Accelerator,
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
        rewards=join_rewards(rewards, teacher, draws, args) if rewards else None,
        num_renoisings=args.num_renoisings,
        importance_weighting=args.importance_weighting,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def load_rewards(args: argparse.Namespace, device: torch.device) -> list[WeightedReward]:
    """The external rewards that the arguments name.

    Raises:
        ValueError: as `load_reward`, and if two have one name.
    """
    loaded = [load_reward(spec, device) for spec in args.reward or ()]
    if len({weighted.reward.name for weighted in loaded}) < len(loaded):
        raise ValueError(f"Two of the rewards {', '.join(args.reward)} have one name; name each once.")
    boxes = [weighted.reward.name for weighted in loaded if not weighted.reward.differentiable]
    if boxes and args.group_size == 1 and args.black_box_form != "perturbation":
        raise ValueError(
            f"The reward {boxes[0]} gives no gradients, and --black_box_form {args.black_box_form} compares the "
            "members of a group: raise --group_size above 1, or choose perturbation."
        )
    if loaded and args.reward_share > 0.5 and args.reward_combination == "share":
        print(
            f"warning: --reward_share {args.reward_share} lets the rewards outweigh fidelity; above 0.5 is not advised."
        )
    return loaded


def join_rewards(
    loaded: list[WeightedReward], teacher: Teacher, draws: Draws, args: argparse.Namespace
) -> ExternalRewards:
    """Rewards as a run asks them: through the teacher's decoder, and joined as the arguments say."""
    weights = {weighted.reward.name: weighted.weight for weighted in loaded}
    if args.gradient_checkpointing:
        teacher.pipeline.vae.enable_gradient_checkpointing()
    return ExternalRewards(
        rewards=[weighted.reward for weighted in loaded],
        combination=GNDMR(args.group_size, weights, args.reward_share, args.reward_combination, args.projection_guard),
        decode=partial(teacher.family.decode, teacher.pipeline),
        draws=draws,
        micro_batch_size=args.train_batch_size,
        black_box=args.black_box_form,
        tilt=args.reward_tilt,
        num_perturbations=args.num_perturbations,
        perturbation_scale=args.perturbation_scale,
    )


def teacher_contrast(teacher: Teacher, prompts: list[str], args: argparse.Namespace) -> float | None:
    """The standard deviation of the teacher's own latents, over a few pictures of 20 steps; None if none are wanted."""
    if not args.monitor_images:
        return None
    chosen = [prompts[i * len(prompts) // args.monitor_images] for i in range(args.monitor_images)]
    teacher.pipeline.set_progress_bar_config(disable=True)
    latents = [
        teacher.pipeline(
            prompt,
            num_inference_steps=20,
            generator=torch.Generator().manual_seed(i),
            output_type="latent",
            **teacher.family.guided(args.guidance_scale),
            **teacher.call_options,
        ).images
        for i, prompt in enumerate(chosen)
    ]
    return torch.cat(latents).float().std().item()


def make_state(networks: Networks, accelerator: Accelerator, args: argparse.Namespace) -> TrainState:
    """Optimisers for student and fake score, the student's moving average, and the running means."""
    rates = {STUDENT: args.learning_rate, FAKE_SCORE: args.fake_learning_rate}
    optimizers = {role: make_optimizer(networks.parameters(role), rate, args) for role, rate in rates.items()}
    ema = EMAModel(networks.parameters(STUDENT), decay=args.ema_decay) if args.use_ema else None
    return TrainState(optimizers, ema, statistics=RunningMeans(partial(accelerator.reduce, reduction="sum")))
