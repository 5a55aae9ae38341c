"""Checks for values that exclude each other; each error is one sentence, before any long work starts."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING

from diffusers.optimization import get_polynomial_decay_schedule_with_warmup

from ..distillation import ALGORITHMS, settings_of
from ..families import Lora, is_single_file
from ..sharding import is_sharded_launch
from ..tiny import is_tiny
from .consistency import check_consistency
from .discriminator import check_discriminator
from .optimizers import USUAL, asked_for, kind_of, kinds_of
from .pictures import needs_pictures
from .students import LoraStudentConfig
from .subjects import ETA, SHARE, MethodConfig
from .time_checks import check_times
from .validation import check_validation

if TYPE_CHECKING:
    from .run_config import RunConfig

IMAGES = ("train_data_dir", "image_column")  # name the user's images
OF_LEARNING = ("target_train_steps", "target_batch_size", "target_learning_rate", "target_rank")
OF_IMAGES = ("target_weight", "center_crop", "random_flip")
OF_DRAWING = ("num_target_images", "target_inference_steps", "target_images_dir")
FEWEST_OF_A_SIZE = 20  # images, of which one is held out
WITHOUT_REWARDS = ("dmd", "gndm")  # names without them; `gndmr` is for both
DEFAULTS = {field.name: field.default for field in fields(MethodConfig)}
LAST_RATE: float = inspect.signature(get_polynomial_decay_schedule_with_warmup).parameters["lr_end"].default


def check(config: RunConfig) -> None:
    """Checks what needs neither teacher nor files; ValueError or ImportError, one sentence on what to do."""
    check_consistency(config)
    _check_algorithm(config)
    check_discriminator(config)
    _check_target(config)
    _check_sizes(config)
    _check_file(config)
    _check_loras(config)
    _check_reuse(config)
    _check_memory(config)
    _check_rates_and_output(config)
    check_validation(config)
    check_times(config)
    _check_groups(config)


def check_rewards(config: RunConfig) -> None:
    """Checks that there are rewards where the algorithm needs them, once those that Python gives are known, too."""
    if config.method.algorithm == "gndmr" and not config.rewards.reward:
        raise ValueError("--algorithm gndmr needs external rewards: add --reward name, for example --reward tiny_bold.")
    _check_algorithm(config)


def _check_algorithm(config: RunConfig) -> None:
    method, rewards = config.method, config.rewards
    algorithm = method.algorithm
    if algorithm in WITHOUT_REWARDS and rewards.reward:
        raise ValueError(f"--algorithm {algorithm} takes no rewards; use --algorithm gndmr or leave --reward out.")
    if rewards.reward_vae and not _takes_rewards(config):
        raise ValueError("--reward_vae decodes pictures for rewards alone; add --reward name, or leave it out.")
    if not _takes_rewards(config) and (rewards.reward_scheduler != "constant" or rewards.reward_warmup_steps):
        name = "reward_warmup_steps" if rewards.reward_warmup_steps else "reward_scheduler"
        raise ValueError(f"--{name} would have no effect without rewards; leave it out, or use --algorithm gndmr.")
    if algorithm == "dmd" and method.preset not in (None, "dmd2"):
        raise ValueError(f"--algorithm dmd is the preset dmd2; leave --preset {method.preset} out or use gndm.")
    if algorithm == "dmd" and method.gndm_lambda != 0:
        raise ValueError(f"--algorithm dmd corrects nothing; leave --gndm_lambda {method.gndm_lambda} out or use gndm.")
    for name in sorted({name for other in ALGORITHMS for name in settings_of(other)} - {*settings_of(algorithm)}):
        if getattr(method, name) != DEFAULTS[name]:
            raise ValueError(f"--{name} would have no effect with --algorithm {algorithm}; leave it out.")
    if rewards.reward_share == 1 and not rewards.projection_guard:
        raise ValueError(f"--reward_share is {rewards.reward_share}; it must {SHARE.wants}.")
    if method.eta not in (0, 1):
        raise ValueError(f"--eta is {method.eta}; it must {ETA.wants}.")


def _takes_rewards(config: RunConfig) -> bool:
    return config.method.algorithm == "gndmr" or bool(config.rewards.reward)


def _check_target(config: RunConfig) -> None:
    target = config.target
    usual = {field.name: field.default for field in fields(target)}
    usual["target_rank"] = getattr(config.student, "rank", 64)
    changed = [name for name, value in usual.items() if getattr(target, name) != value]
    changed += ["target_images_dir"] if config.output.target_images_dir is not None else []
    images = [name for name in IMAGES if getattr(config.prompts, name) is not None]
    of_target = OF_LEARNING if needs_pictures(config) else (*usual, "target_images_dir", *IMAGES)
    rules: list[tuple[object, tuple[str, ...], str]] = [
        (target.teacher_target == "score", of_target, "add --teacher_target samples"),
        (not images, OF_IMAGES, "add --train_data_dir with images"),
        (images and target.target_weight == 1, OF_DRAWING,
         "have the teacher draw images, too, with a --target_weight below 1"),
    ]  # fmt: skip
    for holds, names, remedy in rules:
        idle = [name for name in (*changed, *images) if holds and name in names]
        if idle:
            raise ValueError(f"--{idle[0]} would have no effect; leave it out, or {remedy}.")


def _check_sizes(config: RunConfig) -> None:
    teacher = config.teacher
    if teacher.resolution not in teacher.sizes:
        raise ValueError(
            f"--resolution is {teacher.resolution}, which is not among --aspect_ratio_buckets; add it there, or leave "
            "--resolution out."
        )
    if len(teacher.sizes) > 1 and config.output.target_images_dir:
        raise ValueError("--target_images_dir is for images of one size; leave it out, or --aspect_ratio_buckets.")
    target, draws = config.target, needs_pictures(config) and _teacher_draws(config)
    if draws and target.num_target_images < FEWEST_OF_A_SIZE * len(teacher.sizes):
        raise ValueError(
            f"--num_target_images is {target.num_target_images}; it must be at least {FEWEST_OF_A_SIZE} for each "
            f"of the {len(teacher.sizes)} --aspect_ratio_buckets."
        )


def _teacher_draws(config: RunConfig) -> bool:
    """Whether the target learns images of the teacher, too."""
    return config.target.target_weight < 1 or not any(getattr(config.prompts, name) is not None for name in IMAGES)


def _check_file(config: RunConfig) -> None:
    teacher = config.teacher
    if teacher.single_file_config and not is_single_file(teacher.pretrained_model_name_or_path):
        raise ValueError(
            f"--single_file_config would have no effect, because {teacher.pretrained_model_name_or_path} is no single "
            "file; leave it out."
        )


def _check_loras(config: RunConfig) -> None:
    loras, student = config.teacher.teacher_lora, config.student
    if len({Lora.parse(each).name for each in loras}) < len(loras):
        raise ValueError("--teacher_lora names one LoRA twice; name each once, with one scale.")
    if loras and student.quantization:
        raise ValueError(
            f"--teacher_lora cannot be added exactly to weights in {student.quantization}; leave the quantisation out."
        )
    if not isinstance(student, LoraStudentConfig):
        return
    if student.student_base != "plain" and not loras:
        raise ValueError("--student_base would have no effect; leave it out, or add --teacher_lora.")
    if student.init_lora and Lora.parse(student.init_lora).scale != 1:
        raise ValueError(f"--init_lora {student.init_lora} has a scale, which only --teacher_lora takes; leave it out.")


def _check_reuse(config: RunConfig) -> None:
    reuse = config.method.reuse_rollouts
    if config.method.importance_weighting != "none" and (reuse == 1 or config.method.eta == 0):
        raise ValueError(
            "--importance_weighting weighs reused rollouts of a stochastic student: it needs --reuse_rollouts above 1 "
            "and --eta above 0."
        )
    counts = {
        "max_train_steps": config.optimisation.max_train_steps,
        "checkpointing_steps": config.output.checkpointing_steps,
    }
    if config.validation.metric_for_best_model is not None:
        counts["validation_steps"] = config.output.validation_steps
    for name, count in counts.items():
        if count % reuse:
            raise ValueError(
                f"--{name} is {count}; it must be a multiple of --reuse_rollouts {reuse}, so that no checkpoint falls "
                "between the updates that share a rollout."
            )


def _check_memory(config: RunConfig) -> None:
    memory, quantization = config.memory, config.student.quantization
    others = {
        "--gradient_checkpointing": memory.gradient_checkpointing,
        "--torch_compile": memory.torch_compile,
        "--base_quantization": quantization,
        f"--mixed_precision {memory.mixed_precision}": memory.mixed_precision != "no",  # would round the adapters away
        "FSDP": is_sharded_launch(),
    }
    for flag, given in others.items():
        if config.fold_adapters and given:
            raise ValueError(f"--fold_adapters and {flag} exclude each other; add --no-fold_adapters.")
    if memory.use_8bit_adam and memory.optim != USUAL:
        raise ValueError(f"--use_8bit_adam and --optim {memory.optim} exclude each other; leave one of them out.")
    if not config.output.dry_run:
        kind_of(memory)
    if is_sharded_launch() and memory.mixed_precision == "fp16":
        raise ValueError("FSDP shards cannot be scaled for fp16; use --mixed_precision bf16 or no.")
    if is_sharded_launch() and memory.channels_last:
        raise ValueError("--channels_last cannot be sharded by FSDP; leave it out.")
    if is_sharded_launch() and kinds_of(memory)[0].package != "torch":
        raise ValueError(f"{asked_for(memory)} cannot step FSDP's shards; leave it out, the shards are small.")
    if is_sharded_launch() and quantization and config.is_lora:
        raise ValueError("FSDP cannot shard a quantised base; leave out --base_quantization, or FSDP.")


def _check_rates_and_output(config: RunConfig) -> None:
    optimisation, output = config.optimisation, config.output
    lowest = min(optimisation.learning_rate, optimisation.fake_learning_rate)
    lowest *= optimisation.samples_per_update if optimisation.scale_lr else 1
    if optimisation.lr_scheduler == "polynomial" and lowest <= LAST_RATE:
        raise ValueError(
            f"--lr_scheduler polynomial ends at {LAST_RATE:g}, so --learning_rate and --fake_learning_rate must be "
            "above that."
        )
    if optimisation.lr_scheduler == "constant" and optimisation.lr_warmup_steps:
        _warn("--lr_warmup_steps has no effect with --lr_scheduler constant; use constant_with_warmup.")
    asked = len(output.validation_prompt)
    if asked > output.num_validation_images:
        raise ValueError(
            f"--num_validation_images is {output.num_validation_images}, too few to show all {asked} that "
            f"--validation_prompt gives; it must be at least {asked}."
        )
    teacher = config.teacher
    if output.num_eval_images and (teacher.teacher_lora or not is_tiny(teacher.pretrained_model_name_or_path)):
        _warn("--num_eval_images measures students of the embedded teachers alone; use rdm-evaluate.")


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)


def _check_groups(config: RunConfig) -> None:
    method, samples = config.method, config.optimisation.samples_per_update
    if method.gndm_lambda != 0 and method.group_size == 1:
        raise ValueError("GNDM corrects with the other members of a group: --group_size 1 needs --gndm_lambda 0.")
    if method.gndm_lambda != 0 and method.fake_score_unconditional:
        raise ValueError(
            "GNDM corrects a fake score that knows its group's prompt: --fake_score_unconditional needs "
            "--gndm_lambda 0."
        )
    if method.steps_per_rollout > method.num_student_steps:
        raise ValueError(
            f"--steps_per_rollout {method.steps_per_rollout} is more than the {method.num_student_steps} steps of a "
            "rollout; lower it."
        )
    unit = method.group_size * method.steps_per_rollout
    if samples % unit:
        raise ValueError(
            f"An update has {samples} samples (--train_batch_size x --gradient_accumulation_steps), which is not a "
            f"multiple of {unit} (--group_size x --steps_per_rollout); change one of these four."
        )
