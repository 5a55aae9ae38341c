"""What can be wrong with a run's arguments, each said in one sentence before any long work starts."""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
from pathlib import Path

from diffusers.optimization import get_polynomial_decay_schedule_with_warmup

from ..families import full_name
from ..pipelines import is_student
from ..tiny import is_tiny
from .bounds import ETA, SHARE
from .launch import is_sharded_launch
from .optimizers import eight_bit_package

# A resumed run may change these; everything else must be as it was. Where the learning rate is scheduled to the end of
# the run, that end is no longer free.
FREE_ON_RESUME = {
    "output_dir", "logging_dir", "report_to", "tracker_project_name", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "validation_prompt", "monitor_images", "num_validation_images", "validation_steps",
    "num_eval_images", "sample_guidance_scale", "max_train_steps", "learning_rate", "fake_learning_rate",
    "max_grad_norm", "cache_dir", "gradient_checkpointing", "allow_tf32", "stop_on_collapse", "offload",
    "enable_xformers_memory_efficient_attention", "attention_backend", "torch_compile", "torch_compile_backend",
    "dry_run", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_commit_message",
    "hub_tag_checkpoints", "command",
}  # fmt: skip

LAST_RATE: float = inspect.signature(get_polynomial_decay_schedule_with_warmup).parameters["lr_end"].default
# Where the prompts come from is free, too, where their digest says that they are the same.
PROMPTS, PROMPTS_DIGEST = {
    "prompts_file", "dataset_name", "dataset_config_name", "dataset_split", "caption_column", "max_train_samples",
}, "prompts_sha256"  # fmt: skip
FOLDERS = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path")  # where they are no names


def check_arguments(args: argparse.Namespace) -> None:
    """Checks what needs neither teacher nor files.

    Raises:
        ValueError, ImportError: one sentence on what is wrong and what to do.
    """
    _check_algorithm(args)
    _check_memory(args)
    _check_optimisation(args)
    _check_output(args)
    if args.gndm_lambda != 0 and args.group_size == 1:
        raise ValueError("GNDM corrects with the other members of a group: --group_size 1 needs --gndm_lambda 0.")
    if args.eta not in (0, 1):
        raise ValueError(f"--eta is {args.eta}; it must {ETA.wants}.")
    if args.steps_per_rollout > args.num_student_steps:
        raise ValueError(
            f"--steps_per_rollout {args.steps_per_rollout} is more than the {args.num_student_steps} steps of a "
            "rollout; lower it."
        )
    samples, unit = args.train_batch_size * args.gradient_accumulation_steps, args.group_size * args.steps_per_rollout
    if samples % unit:
        raise ValueError(
            f"An update has {samples} samples (--train_batch_size x --gradient_accumulation_steps), which is not a "
            f"multiple of {unit} (--group_size x --steps_per_rollout); change one of these four."
        )


def _check_algorithm(args: argparse.Namespace) -> None:
    if args.algorithm == "gndmr" and not args.reward:
        raise ValueError("--algorithm gndmr needs external rewards: add --reward name, for example --reward tiny_bold.")
    if args.algorithm != "gndmr" and args.reward:
        raise ValueError(f"--algorithm {args.algorithm} takes no rewards; use --algorithm gndmr or leave --reward out.")
    if args.algorithm == "dmd" and args.preset not in (None, "dmd2"):
        raise ValueError(f"--algorithm dmd is the preset dmd2; leave --preset {args.preset} out or use gndm.")
    if args.algorithm == "dmd" and args.gndm_lambda not in (None, 0):
        raise ValueError(f"--algorithm dmd corrects nothing; leave --gndm_lambda {args.gndm_lambda} out or use gndm.")
    if args.reward_share == 1 and not args.projection_guard:
        raise ValueError(f"--reward_share is {args.reward_share}; it must {SHARE.wants}.")
    if args.importance_weighting != "none" and (args.reuse_rollouts == 1 or args.eta == 0):
        raise ValueError(
            "--importance_weighting weighs reused rollouts of a stochastic student: it needs --reuse_rollouts above 1 "
            "and --eta above 0."
        )
    for name in ("max_train_steps", "checkpointing_steps"):
        if getattr(args, name) % args.reuse_rollouts:
            raise ValueError(
                f"--{name} is {getattr(args, name)}; it must be a multiple of --reuse_rollouts {args.reuse_rollouts}, "
                "so that no checkpoint falls into the middle of a rollout's service."
            )


def _check_memory(args: argparse.Namespace) -> None:
    folds = getattr(args, "fold_adapters", False)
    others = {
        "--gradient_checkpointing": args.gradient_checkpointing,
        "--torch_compile": args.torch_compile,
        "--base_quantization": args.quantization,
        "--mixed_precision bf16": args.mixed_precision == "bf16",  # which would round the adapters away
        "FSDP": is_sharded_launch(),
    }
    for flag, given in others.items():
        if folds and given:
            raise ValueError(f"--fold_adapters and {flag} exclude each other; add --no-fold_adapters.")
    if args.use_8bit_adam and not args.dry_run:
        eight_bit_package()
    if is_sharded_launch() and args.use_8bit_adam:
        raise ValueError("--use_8bit_adam cannot step FSDP's shards; leave it out, the shards are small.")
    if is_sharded_launch() and args.quantization and args.student == "lora":
        raise ValueError("FSDP cannot shard a quantised base; leave out --base_quantization, or FSDP.")


def _check_optimisation(args: argparse.Namespace) -> None:
    if args.lr_scheduler == "polynomial" and min(args.learning_rate, args.fake_learning_rate) <= LAST_RATE:
        raise ValueError(
            f"--lr_scheduler polynomial ends at {LAST_RATE:g}, so --learning_rate and --fake_learning_rate must be "
            "above that."
        )
    if args.lr_scheduler == "constant" and args.lr_warmup_steps:
        print("warning: --lr_warmup_steps has no effect with --lr_scheduler constant; use constant_with_warmup.")


def _check_output(args: argparse.Namespace) -> None:
    asked = len(args.validation_prompt or ())
    if asked > args.num_validation_images:
        raise ValueError(
            f"--num_validation_images is {args.num_validation_images}, too few to show all {asked} that "
            f"--validation_prompt gives; it must be at least {asked}."
        )
    if args.num_eval_images and not is_tiny(args.pretrained_model_name_or_path):
        print("warning: --num_eval_images measures students of the embedded teachers alone; use rdm-evaluate.")


def prepare_output(args: argparse.Namespace) -> Path:
    """Makes the output folder.

    Raises:
        ValueError: if it cannot be written, or holds another run and nothing says to resume.
    """
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a name of its own for every process
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written ({error.strerror}); choose another.") from error
    if args.resume_from_checkpoint is None and (any(folder.glob("checkpoint-*")) or is_student(folder)):
        raise ValueError(
            f"--output_dir {folder} holds the checkpoints or the student of another run; add --resume_from_checkpoint "
            "latest, or choose another folder."
        )
    return folder


def with_full_names(arguments: dict) -> dict:
    """A run's arguments with local folders of teacher and autoencoder by their full path."""
    names = {name: arguments.get(name) for name in FOLDERS}
    return {**arguments, **{name: full_name(folder) for name, folder in names.items() if folder}}


def check_resumable(args: argparse.Namespace, saved: dict) -> None:
    """Refuses to resume with arguments that would make another run of it.

    Raises:
        ValueError: naming the flags that differ, or saying that the prompts do.
    """
    now, saved = json.loads(json.dumps(vars(args))), {"dataset_split": "train", **with_full_names(saved)}
    free = FREE_ON_RESUME - (set() if args.lr_scheduler.startswith("constant") else {"max_train_steps"})
    free |= PROMPTS if {PROMPTS_DIGEST} <= now.keys() & saved.keys() else {PROMPTS_DIGEST}  # version 0.1.0 had none
    changed = [name for name in saved if name not in free and now.get(name) != saved[name]]
    if changed:
        told = {name: f"--{name} (was {saved[name]}, is {now.get(name)})" for name in changed}
        flags = ", ".join((told | {PROMPTS_DIGEST: "other prompts"})[name] for name in changed)
        raise ValueError(f"The checkpoint was made with other arguments: {flags}; set them back or start a new run.")
