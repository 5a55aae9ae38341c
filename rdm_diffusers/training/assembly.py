"""What a run is made of: its teacher, its networks, its sampler, its optimisers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, ModelMixin
from diffusers.training_utils import EMAModel
from peft import LoraConfig

from ..adapters import fill_adapter
from ..config import LoraStudentConfig, RunConfig
from ..distillation import GNDM, LCM, MATCHINGS, Draws, RunningMeans, TimeDistribution, settings_of
from ..distillation.tdm import make_renoising
from ..families import (
    Conditioning,
    Family,
    Lora,
    LoraLayers,
    PromptOptions,
    Teacher,
    add_layers,
    check_lora,
    load_denoiser,
    load_teacher,
    read_lora,
)
from ..networks import ADAPTERS, FAKE_SCORE, STUDENT, TEACHER, Networks, SeparateNetworks, SharedBase
from ..rewards import WeightedReward
from ..schedulers import RdmScheduler, shifted, stretched
from ..sharding import is_sharded, is_sharded_launch
from .checkpoints import TrainState
from .devices import compile_blocks, place, prepare_denoiser, prepare_vae, use_channels_last
from .epochs import rate_factor
from .external_rewards import join_rewards
from .fake_score import add_to_fake_score
from .finite import OF_FP16, OF_RATES, FiniteChecks
from .optimizers import make_optimizer
from .prompts import PromptGroups, Texts
from .run import Distillation

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prompt_options(config: RunConfig) -> PromptOptions:
    """How a run's prompts are read."""
    teacher = config.teacher
    return PromptOptions(teacher.max_sequence_length, teacher.resolution, config.method.guidance_scale)


def load(config: RunConfig, device: torch.device) -> Teacher:
    """A run's teacher, on the CPU; the device is for what needs one to be quantised."""
    teacher = config.teacher
    loaded = load_teacher(
        teacher.pretrained_model_name_or_path,
        DTYPES[config.memory.mixed_precision],
        teacher.revision,
        teacher.variant,
        prompt_options(config),
        teacher.pretrained_vae_model_name_or_path,
        config.student.quantization,
        device,
        [Lora.parse(each) for each in teacher.teacher_lora],
        teacher.single_file_config,
    )
    prepare_vae(loaded.pipeline.vae, config.memory)
    return loaded


def load_trained(config: RunConfig, teacher: Teacher) -> ModelMixin:
    """The network that a full student begins with: the teacher's, in float32."""
    source = config.teacher
    own: dict[str, Any] = {"single_file_config": source.single_file_config}
    denoiser = load_denoiser(teacher.name, torch.float32, source.revision, source.variant, **own).eval()
    add_layers(denoiser, teacher.lora_layers)
    return denoiser


def make_scheduler(teacher: Teacher, num_steps: int, eta: float, grid: Sequence[float] = ()) -> RdmScheduler:
    """A few-step sampler on a grid of timesteps or flow sigmas; by default on that of the exported stock scheduler."""
    if not grid:
        stock = teacher.family.stock_scheduler(teacher.pipeline.scheduler, num_steps, eta)
        stock.set_timesteps(num_steps)
        grid = (stock.sigmas[:-1] if teacher.schedule.is_flow else stock.timesteps).tolist()
    own = {"student_sigmas" if teacher.schedule.is_flow else "student_timesteps": list(grid)}
    config = {**teacher.pipeline.scheduler.config, "timestep_spacing": "trailing", "steps_offset": 0}
    scheduler: RdmScheduler = RdmScheduler.from_config(config, prediction_type=teacher.prediction_type, eta=eta, **own)
    return scheduler


def student_scheduler(teacher: Teacher, config: RunConfig) -> RdmScheduler:
    """The sampler of a run's student, on its grid."""
    count, grid = config.method.num_student_steps, config.times.student_sigmas or config.times.student_timesteps
    if config.times.student_grid == "shifted":
        grid = _shifted_grid(teacher, config, count)
    return make_scheduler(teacher, count, config.method.eta, grid)


def teacher_scheduler(teacher: Teacher, config: RunConfig, num_steps: int) -> RdmScheduler:
    """A deterministic sampler on the grid that the teacher's own pipeline lays for so many steps."""
    settings = teacher.pipeline.scheduler.config
    if teacher.schedule.is_flow:
        grid, last = _shifted_grid(teacher, config, num_steps), settings.get("shift_terminal")
        return make_scheduler(teacher, num_steps, 0.0, stretched(grid, last) if last else grid)
    stock = DDIMScheduler.from_config(settings, timestep_spacing=settings.get("timestep_spacing", "leading"))
    stock.set_timesteps(num_steps)
    return make_scheduler(teacher, num_steps, 0.0, stock.timesteps.tolist())


def _shifted_grid(teacher: Teacher, config: RunConfig, count: int) -> tuple[float, ...]:
    """So many sigmas, 1 the first, with the teacher's shift."""
    return tuple(shifted((count - i) / count, teacher_shift(teacher, config, count)) for i in range(count))


def teacher_shift(teacher: Teacher, config: RunConfig, num_steps: int | None = None) -> float:
    """The shift s of a teacher's noise levels, at the run's resolution: u becomes s u / (1 + (s - 1) u). 1 is none.

    Some teachers' depends on the number of steps, by default their pipeline's own.
    """
    settings = teacher.pipeline.scheduler.config
    if not settings.get("use_dynamic_shifting"):
        return settings.get("shift", settings.get("flow_shift", 1.0)) if teacher.schedule.is_flow else 1.0
    latents = teacher.family.latent_shape(teacher.pipeline, config.teacher.resolution)
    length = teacher.family.schedule_length(*latents)
    mu = teacher.family.dynamic_shift(settings, length, num_steps or teacher.family.default_num_steps)
    return math.exp(mu) if settings.time_shift_type == "exponential" else mu


def lora_config(family: Family, student: LoraStudentConfig) -> LoraConfig:
    """The shape of the student's LoRA and of the fake score's."""
    layers = student.lora_layers.split(",") if student.lora_layers else list(family.lora_target_modules)
    return _lora_of(layers, student.rank, student.lora_alpha)


def target_config(family: Family, config: RunConfig) -> LoraConfig | None:
    """The shape of the target's LoRA, if the run learns a target."""
    rank = config.target.target_rank
    return _lora_of(list(family.lora_target_modules), rank, rank) if config.target.teacher_target == "samples" else None


def _lora_of(layers: list[str], rank: int, alpha: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, init_lora_weights="gaussian")


def make_networks(
    config: RunConfig, family: Family, teacher: ModelMixin, trained: Callable[[], ModelMixin], **common: Any
) -> Networks:
    """The roles, for a run, a plan of its memory, and an export of its checkpoints alike.

    Args:
        config: of the run.
        family: the teacher's.
        teacher: its denoiser; a LoRA student's base, to which the adapters are added, drawn from the run's seed.
        trained: makes the network that a full student begins with; called for each trained role.
        common: as `Networks` takes it.

    Raises:
        ValueError: if the teacher's stock pipeline could not load a LoRA student.
    """
    common["target_config"] = target_config(family, config)
    common["fake_score_unconditional"] = config.method.fake_score_unconditional
    has_fake_score = config.method.algorithm in MATCHINGS
    if isinstance(config.student, LoraStudentConfig):
        check_lora(family)
        prepare_denoiser(teacher, config.memory, family)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.optimisation.seed)
            adapters = lora_config(family, config.student)
            return SharedBase(
                teacher, adapters, fold_adapters=config.fold_adapters, has_fake_score=has_fake_score, family=family,
                **common,
            )  # fmt: skip
    denoisers = {STUDENT: trained(), **({FAKE_SCORE: trained()} if has_fake_score else {}), TEACHER: teacher}
    for denoiser in denoisers.values():
        prepare_denoiser(denoiser, config.memory, family)
    return SeparateNetworks(denoisers, family=family, **common)


def networks_of_run(config: RunConfig, teacher: Teacher, nothing: Conditioning, accelerator: Accelerator) -> Networks:
    """A run's networks, on its devices, compiled if that is asked for; `nothing` is the empty prompt, of length 1."""
    student = config.student
    start: LoraLayers = {}
    if isinstance(student, LoraStudentConfig) and student.init_lora:
        start = read_lora(teacher.pipeline, Lora.parse(student.init_lora))[teacher.family.denoiser_name]
    networks = make_networks(
        config,
        teacher.family,
        teacher.denoiser,
        partial(load_trained, config, teacher),
        schedule=teacher.schedule.to(accelerator.device),
        prediction_type=teacher.prediction_type,
        null_conditioning=nothing.to(accelerator.device, DTYPES[config.memory.mixed_precision]),
        guidance_scale=guidance_outside(config, teacher.family, teacher.pipeline),
        guidance_interval=config.times.guidance_interval,
        compute_dtype=None if config.memory.mixed_precision == "no" else DTYPES[config.memory.mixed_precision],
    )
    if start and isinstance(networks, SharedBase):
        fill_adapter(networks.layers, ADAPTERS[STUDENT], start)
    place(networks, accelerator)
    for denoiser in networks.modules:
        if config.memory.channels_last:
            use_channels_last(denoiser)
        compile_blocks(denoiser, config.memory)
    latents = teacher.family.latent_shape(teacher.pipeline, config.teacher.resolution)
    add_to_fake_score(networks, teacher.family, config, latents)
    return networks


def guidance_outside(config: RunConfig, family: Family, pipeline: Any) -> float:
    """The scale of guidance by two calls; 1 where the denoiser is guided inside one."""
    return 1.0 if family.embeds_guidance(pipeline) else config.method.guidance_scale


def make_distillation(
    teacher: Teacher,
    networks: Networks,
    texts: Texts,
    rewards: list[WeightedReward],
    config: RunConfig,
    accelerator: Accelerator,
) -> Distillation:
    """Gathers what stays the same through a run."""
    method, optimisation = config.method, config.optimisation
    draws = Draws(optimisation.seed, method.group_size, accelerator.device)
    times, shift, scheduler = config.times, teacher_shift(teacher, config), student_scheduler(teacher, config)
    distribution = partial(TimeDistribution, mean=times.logit_mean, std=times.logit_std, shift=shift)
    return Distillation(
        networks=networks,
        scheduler=scheduler,
        renoising=make_renoising(times.renoising, networks.schedule, scheduler),
        objective=make_objective(config),
        prompts=PromptGroups(
            texts.prompts, texts.embeddings, draws, DTYPES[config.memory.mixed_precision], captions=texts.captions
        ),
        draws=draws,
        latent_shape=teacher.family.latent_shape(teacher.pipeline, config.teacher.resolution),
        groups_per_update=optimisation.samples_per_update // (method.group_size * method.steps_per_rollout),
        steps_per_rollout=method.steps_per_rollout,
        micro_batch_size=optimisation.train_batch_size,
        rewards=join_rewards(rewards, teacher, draws.device, config) if rewards else None,
        num_renoisings=method.num_renoisings,
        renoising_distribution=distribution(times.renoising_time_distribution),
        fake_distribution=distribution(times.fake_time_distribution),
        guidance_range=times.guidance_range,
        decoupled_guidance=times.decoupled_guidance,
        importance_weighting=method.importance_weighting,
        guidance_cls_loss_weight=method.guidance_cls_loss_weight,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        is_sharded=is_sharded(accelerator),
        checks=FiniteChecks(OF_FP16 if config.memory.mixed_precision == "fp16" else OF_RATES),
        sync_each_batch=config.memory.sync_each_batch,
    )


def make_objective(config: RunConfig) -> GNDM | LCM:
    """A run's objective, without the rewards."""
    method = config.method
    settings = {name: getattr(method, name) for name in settings_of(method.algorithm)}
    if method.algorithm == "lcm":
        return LCM(**settings)
    return GNDM(
        matching=MATCHINGS[method.algorithm](**settings),
        group_size=method.group_size,
        gndm_lambda=method.gndm_lambda,
        advantage_normalization=method.advantage_normalization,
        bias_estimator=method.bias_estimator,
        steps_per_rollout=method.steps_per_rollout,
        pool_steps=method.pool_steps,
        gen_cls_loss_weight=method.gen_cls_loss_weight,
    )


def make_state(networks: Networks, accelerator: Accelerator, config: RunConfig) -> TrainState:
    """Optimisers for student and fake score, the student's moving average, and the running means."""
    optimisation = config.optimisation
    rates = {STUDENT: optimisation.learning_rate, FAKE_SCORE: optimisation.fake_learning_rate}
    factor = rate_factor(config, accelerator.num_processes)
    optimizers = {
        role: make_optimizer(networks.parameters(role), factor * rates[role], config) for role in networks.trained_roles
    }
    ema = EMAModel(networks.parameters(STUDENT), decay=optimisation.ema_decay) if optimisation.use_ema else None
    if ema is not None and config.memory.offload and not is_sharded_launch():
        ema.to("cpu")
    return TrainState(optimizers, ema, statistics=RunningMeans(partial(accelerator.reduce, reduction="sum")))
