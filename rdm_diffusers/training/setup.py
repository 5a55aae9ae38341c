"""What a run is assembled from, before the loop starts."""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from peft import LoraConfig

from ..distillation import Draws, RunningMeans, draw_samples
from ..errors import one_line
from ..families import Family, PromptOptions, Teacher, check_lora, load_denoiser, load_teacher
from ..networks import FAKE_SCORE, STUDENT, TEACHER, Networks, SeparateNetworks, SharedBase
from ..rewards import WeightedReward
from ..schedulers import RdmScheduler
from .arguments import groups_per_update, make_objective
from .checkpoints import TrainState
from .external_rewards import join_rewards
from .launch import is_sharded_launch
from .optimizers import make_optimizer
from .placement import place
from .prompts import PromptGroups, Texts
from .speed import compile_blocks, prepare_denoiser
from .updates import Distillation

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
CONTRAST_STEPS = 20  # of the teacher, where its contrast is measured


def prompt_options(args: argparse.Namespace) -> PromptOptions:
    """How the arguments want prompts to be read."""
    return PromptOptions(args.max_sequence_length, args.resolution, args.guidance_scale)


def load(args: argparse.Namespace, device: torch.device) -> Teacher:
    """The teacher that the arguments name, on the CPU; the device is for what needs one to be quantised."""
    return load_teacher(
        args.pretrained_model_name_or_path,
        DTYPES[args.mixed_precision],
        args.revision,
        args.variant,
        prompt_options(args),
        args.pretrained_vae_model_name_or_path,
        args.quantization,
        device,
    )


def make_scheduler(teacher: Teacher, num_steps: int, eta: float) -> RdmScheduler:
    """A few-step sampler on the very grid that the exported stock scheduler will lay."""
    stock = teacher.family.stock_scheduler(teacher.pipeline.scheduler, num_steps, eta)
    stock.set_timesteps(num_steps)
    if teacher.schedule.is_flow:
        grid = {"student_sigmas": stock.sigmas[:-1].tolist()}
    else:
        grid = {"student_timesteps": stock.timesteps.tolist()}
    config = {**teacher.pipeline.scheduler.config, "timestep_spacing": "trailing", "steps_offset": 0}
    return RdmScheduler.from_config(config, prediction_type=teacher.prediction_type, eta=eta, **grid)


def lora_config(family: Family, args: argparse.Namespace) -> LoraConfig:
    """The shape of both LoRAs."""
    layers = args.lora_layers.split(",") if args.lora_layers else list(family.lora_target_modules)
    return LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=layers, init_lora_weights="gaussian")


def make_lora_networks(
    teacher: Teacher, texts: Texts, args: argparse.Namespace, accelerator: Accelerator
) -> SharedBase:
    """The three roles on the teacher's own network, with fresh LoRAs drawn from the seed.

    Raises:
        ValueError: if the teacher's stock pipeline could not load them.
    """
    check_lora(teacher.family)
    prepare_denoiser(teacher.denoiser, args)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        config = lora_config(teacher.family, args)
        networks = SharedBase(
            teacher.denoiser, config, fold_adapters=args.fold_adapters, **_common(teacher, texts, args)
        )
    _finish(networks, teacher.denoiser, teacher, args, accelerator)
    return networks


def make_full_networks(
    teacher: Teacher, texts: Texts, args: argparse.Namespace, accelerator: Accelerator
) -> SeparateNetworks:
    """A network a role: the teacher's as it was loaded, the trained ones in float32."""
    source = (args.pretrained_model_name_or_path, torch.float32, args.revision, args.variant)
    denoisers = {role: load_denoiser(*source).eval() for role in (STUDENT, FAKE_SCORE)} | {TEACHER: teacher.denoiser}
    for denoiser in denoisers.values():
        prepare_denoiser(denoiser, args)
    networks = SeparateNetworks(denoisers, **_common(teacher, texts, args))
    _finish(networks, denoisers[FAKE_SCORE], teacher, args, accelerator)
    return networks


def _common(teacher: Teacher, texts: Texts, args: argparse.Namespace) -> dict[str, Any]:
    """What all kinds of `Networks` take."""
    guided_inside = teacher.family.embeds_guidance(teacher.pipeline)
    return {
        "family": teacher.family,
        "schedule": teacher.schedule,
        "prediction_type": teacher.prediction_type,
        "null_conditioning": texts.nothing,
        "guidance_scale": 1.0 if guided_inside else args.guidance_scale,
        "compute_dtype": None if args.mixed_precision == "no" else DTYPES[args.mixed_precision],
    }


def _finish(
    networks: Networks, fake_score: ModelMixin, teacher: Teacher, args: argparse.Namespace, accelerator: Accelerator
) -> None:
    place(networks, accelerator)
    for denoiser in networks.modules:
        compile_blocks(denoiser, args)
    networks.null_conditioning = networks.null_conditioning.to(accelerator.device, DTYPES[args.mixed_precision])
    if args.fake_score_steps:
        networks.add_step_embedding(
            fake_score.get_submodule(teacher.family.time_embedding_name), args.num_student_steps
        )


def make_distillation(
    teacher: Teacher,
    networks: Networks,
    texts: Texts,
    rewards: list[WeightedReward],
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> Distillation:
    """Gathers what stays the same through a run."""
    draws = Draws(args.seed, args.group_size, accelerator.device)
    return Distillation(
        networks=networks,
        scheduler=make_scheduler(teacher, args.num_student_steps, args.eta),
        objective=make_objective(args),
        prompts=PromptGroups(texts.prompts, texts.embeddings, draws, DTYPES[args.mixed_precision]),
        draws=draws,
        latent_shape=teacher.family.latent_shape(teacher.pipeline, args.resolution),
        groups_per_update=groups_per_update(args),
        steps_per_rollout=args.steps_per_rollout,
        micro_batch_size=args.train_batch_size,
        rewards=join_rewards(rewards, teacher, draws.device, args) if rewards else None,
        num_renoisings=args.num_renoisings,
        importance_weighting=args.importance_weighting,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


@torch.no_grad()
def teacher_contrast(run: Distillation, teacher: Teacher, count: int) -> float | None:
    """The standard deviation of the teacher's latents, over `count` pictures of 20 steps; None if none are wanted."""
    if count == 0:
        return None
    prompts = run.prompts.prompts
    conditioning = run.prompts.once([i * len(prompts) // count for i in range(count)])
    generators = [run.draws.generator("contrast", i) for i in range(count)]
    noise = torch.stack([torch.randn(run.latent_shape, generator=generator) for generator in generators])
    latents = draw_samples(
        partial(run.networks.predict, TEACHER),
        make_scheduler(teacher, CONTRAST_STEPS, eta=0.0),
        [noise.to(run.draws.device)],
        conditioning,
        micro_batch_size=run.micro_batch_size,
    )
    run.networks.calls.clear()
    return latents.std().item()


def start_trackers(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Opens the logs that `--report_to` names, with the run's arguments.

    Raises:
        ValueError: if a tracker cannot start, for example because nobody is logged in.
    """
    config = {name: value for name, value in vars(args).items() if isinstance(value, int | float | str)}
    try:
        accelerator.init_trackers(args.tracker_project_name, config=config)
    except Exception as error:  # each tracker has errors of its own
        raise ValueError(
            f"--report_to {args.report_to} cannot start ({one_line(error)}); mend that, or leave the logs out with "
            "--report_to none."
        ) from error


def end_trackers(accelerator: Accelerator) -> None:
    """Closes the logs, and the other processes' share; a tracker that fails now takes nothing with it."""
    try:
        accelerator.end_training()
    except Exception as error:
        warnings.warn(f"The trackers could not be closed ({one_line(error)}); the run goes on.", stacklevel=2)


def make_state(networks: Networks, accelerator: Accelerator, args: argparse.Namespace) -> TrainState:
    """Optimisers for student and fake score, the student's moving average, and the running means."""
    rates = {STUDENT: args.learning_rate, FAKE_SCORE: args.fake_learning_rate}
    optimizers = {role: make_optimizer(networks.parameters(role), rate, args) for role, rate in rates.items()}
    ema = EMAModel(networks.parameters(STUDENT), decay=args.ema_decay) if args.use_ema else None
    if ema is not None and args.offload and not is_sharded_launch():
        ema.to("cpu")
    return TrainState(optimizers, ema, statistics=RunningMeans(partial(accelerator.reduce, reduction="sum")))
