"""The arguments of a run, in the names of the diffusers example scripts.

What each takes stands in `bounds.py`; a flag that is given beats its preset and the tiny teachers' own defaults, which
stand in `presets.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..distillation import BIAS_ESTIMATORS, COMBINATIONS, GNDM, IMPORTANCE_WEIGHTINGS, NORMALIZATIONS
from ..families import QUANTIZATIONS, use_token
from ..parsing import Parser, set_bounds
from ..tiny import TINY_NAME, is_tiny
from ..tiny.reference import REFERENCES
from .bounds import BOUNDS
from .checks import check_arguments, with_full_names
from .external_rewards import REWARD_DTYPES
from .presets import ALGORITHM_PRESETS, PRESETS, TINY_DEFAULTS, TINY_FULL_DEFAULTS, TINY_LORA_DEFAULTS
from .record import command_line
from .secrecy import refuse_secrets

TOKEN_SAFE_TRACKERS = ("tensorboard", "none")  # the others keep the command line
ALGORITHMS = ("dmd", "gndm", "gndmr")


def build_parser(description: str | None = None, student: str = "lora") -> Parser:
    """The parser of `train_rdm_lora.py`, or for a `full` student of `train_rdm_full.py`.

    Every help text names the unit and the default.
    """
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    _add_teacher(parser.add_argument_group("teacher and prompts").add_argument)
    _add_method(parser.add_argument_group("method").add_argument)
    _add_rewards(parser.add_argument_group("rewards").add_argument)
    (_add_lora if student == "lora" else _add_full)(parser.add_argument_group("student").add_argument)
    _add_optimisation(parser.add_argument_group("optimisation").add_argument)
    _add_memory(parser.add_argument_group("memory and speed").add_argument)
    _add_output(parser.add_argument_group("output").add_argument)
    _add_hub(parser.add_argument_group("hub").add_argument)
    parser.set_defaults(student=student, tracker_project_name=f"rdm-{student}")
    set_bounds(parser, BOUNDS)
    return parser


# fmt: off
def _add_teacher(add) -> None:
    add("--pretrained_model_name_or_path", "--pretrained_model", "--pretrained_teacher_model", default=TINY_NAME,
        help="teacher: a folder, a Hub id, or `tiny`, `tiny-v` or `tiny-flow` for an embedded one")
    add("--pretrained_vae_model_name_or_path", help="another autoencoder than the teacher's: a folder or a Hub id")
    add("--revision", help="the teacher's Hub revision")
    add("--variant", help="the teacher's weight variant, for example fp16")
    add("--prompts_file", help="text file with one prompt a line, in UTF-8")
    add("--dataset_name", help="dataset whose captions are the prompts, its images are not used: a Hub id, a folder "
        "(of data files, or by save_to_disk), or one csv, json, jsonl, parquet, arrow or txt file")
    add("--dataset_config_name", help="the dataset's configuration")
    add("--dataset_split", "--dataset_split_name", "--dataset_train_split", default="train",
        help="the dataset's split, or a slice of one, for example validation or train[:1000]")
    add("--caption_column", default="text", help="the dataset's column of captions; all of a row with several")
    add("--max_train_samples", help="use only so many prompts")
    add("--cache_dir", help="where prompt embeddings are cached; by default beside the datasets' cache")
    add("--max_sequence_length", help="tokens of a T5 text encoder; the stock pipeline's number by default")
    add("--resolution", help="pixels per side; the teacher's own by default")


def _add_method(add) -> None:
    add("--algorithm", default="gndm", choices=ALGORITHMS,
        help="dmd: DMD2's objective; gndm: group-normalised R_dm; gndmr: gndm and external rewards")
    add("--preset", choices=tuple(PRESETS),
        help="a variant by name, see the table in presets.py; the algorithm's by default")
    add("--num_student_steps", default=4, help="network calls of the student, 1 to 8 recommended")
    add("--eta", default=1.0, help="the student's stochasticity: 1 re-noises, 0 is deterministic")
    add("--guidance_scale", default=7.5, help="the teacher's w in R_dm: u + w (c - u); 1 is off")
    add("--sample_guidance_scale",
        help="the teacher's w where it is sampled for samples.png and metrics.json; --guidance_scale by default")
    add("--group_size", default=4, help="G, samples of one prompt that share statistics")
    add("--gndm_lambda", help="strength of GNDM's bias correction, 0 to 1; the preset's by default")
    add("--bias_estimator", default="shift", choices=BIAS_ESTIMATORS,
        help="how a group's residuals make a bias: as a shift of the student's mean, or in noise units")
    add("--pool_steps", default=0.5,
        help="share of the bias that is measured over all trained states of a rollout, not at its step alone")
    add("--advantage_normalization", choices=NORMALIZATIONS, help="what R_dm is divided by; the preset's by default")
    add("--num_renoisings", default=1, help="re-noised copies of each sample that estimate R_dm")
    add("--fake_updates_per_step", help="fake-score updates per student update; the preset's by default")
    add("--fake_score_steps", action=argparse.BooleanOptionalAction, default=False,
        help="tell the fake score which student step a sample comes from")
    add("--steps_per_rollout", default=1,
        help="how many states of each rollout are trained on, chosen at random")
    add("--reuse_rollouts", help="updates that one rollout serves; the preset's by default")
    add("--importance_weighting", default="none", choices=IMPORTANCE_WEIGHTINGS,
        help="how reused rollouts are weighed by their likelihood now")


def _add_lora(add) -> None:
    add("--rank", "--lora_rank", default=64, help="rank of both LoRAs")
    add("--lora_alpha", help="LoRA alpha; the rank by default")
    add("--lora_layers", help="comma-separated names of modules, or the ends of their names; a wide set by default")
    add("--fold_adapters", action=argparse.BooleanOptionalAction, default=False,
        help="run with W + scale B A instead of separate adapter layers: faster where memory allows")
    add("--base_quantization", dest="quantization", choices=tuple(QUANTIZATIONS),
        help="keep the frozen base in so few bits, best with --gradient_checkpointing; the LoRAs stay float32")


def _add_full(add) -> None:
    add("--teacher_quantization", dest="quantization", choices=tuple(QUANTIZATIONS),
        help="keep the teacher in so few bits; student and fake score stay float32")


def _add_rewards(add) -> None:
    add("--reward", action="append",
        help="name[=weights][:weight] or path/to/file.py:function[:weight], repeatable; a Python file is executed")
    add("--reward_dtype", default="float32", choices=tuple(REWARD_DTYPES),
        help="of the weights of pretrained rewards; bfloat16 halves their memory")
    add("--reward_share", default=0.2, help="rho, size of the rewards' part beside R_dm, 0 to 1")
    add("--reward_combination", default="share", choices=COMBINATIONS,
        help="share: normalised, with --reward_share; sum: DMDR's plain weighted sum of losses")
    add("--projection_guard", action="store_true", help="drop what of the rewards' part opposes R_dm")
    add("--reward_tilt", default=0.25,
        help="kappa, by how many of their standard deviations rewards without gradients are to rise, about")


def _add_optimisation(add) -> None:
    add("--train_batch_size", default=4, help="samples per device in one forward and backward")
    add("--gradient_accumulation_steps", default=1, help="such batches per update; groups may span them")
    add("--max_train_steps", default=5000, help="student updates")
    add("--learning_rate", default=1e-4, help="the student's")
    add("--fake_learning_rate", help="the fake score's; the student's by default")
    add("--lr_scheduler", default="constant", help="as in diffusers: constant, cosine, linear, ...")
    add("--lr_warmup_steps", default=0, help="updates of warm-up")
    add("--adam_beta1", default=0.9, help="of both optimisers")
    add("--adam_beta2", default=0.999, help="of both optimisers")
    add("--adam_weight_decay", default=1e-2, help="of both optimisers")
    add("--adam_epsilon", default=1e-8, help="of both optimisers")
    add("--max_grad_norm", default=1.0, help="gradients are clipped to this norm, each role by itself; 0 clips nothing")
    add("--use_ema", action=argparse.BooleanOptionalAction, default=True,
        help="export the moving average of the student's weights")
    add("--ema_decay", default=0.99, help="per update")
    add("--seed", default=0, help="decides every random number of the run")


def _add_memory(add) -> None:
    add("--mixed_precision", default=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        help="no or bf16: dtype of frozen weights and of computation; what is trained stays float32")
    add("--use_8bit_adam", action="store_true", help="8-bit AdamW for both roles: bitsandbytes', or else torchao's")
    add("--gradient_checkpointing", action="store_true", help="less memory for more time")
    add("--offload", action="store_true",
        help="keep the moving average off the device, and at the run's end every network that is not at work")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="xformers' attention, for U-Nets")
    add("--attention_backend", help="attention of a transformer by its name in diffusers, for example flash")
    add("--torch_compile", action="store_true", help="compile the blocks that the network repeats")
    add("--torch_compile_backend", default="inductor", help="what compiles them")
    add("--allow_tf32", action="store_true", help="faster float32 on Ampere and later")


def _add_output(add) -> None:
    add("--output_dir", default="rdm-student", help="where the student, its card and the checkpoints go")
    add("--logging_dir", default="logs", help="trackers' folder inside the output folder")
    add("--report_to", default="tensorboard", help="a tracker that accelerate knows, all, or none")
    add("--tracker_project_name", help="the trackers' name of the project")
    add("--checkpointing_steps", default=500, help="updates between checkpoints")
    add("--checkpoints_total_limit", help="keep at most so many checkpoints")
    add("--resume_from_checkpoint", help="a checkpoint folder, or `latest`")
    add("--validation_prompt", action="append", help="prompt of the picture grid, repeatable; some of the prompts else")
    add("--num_validation_images", default=8, help="pictures in each row")
    add("--validation_steps", default=200, help="updates between picture grids")
    add("--monitor_images", default=8,
        help="pictures of the teacher that the student's contrast is compared with; 0 compares none")
    add("--stop_on_collapse", action="store_true", help="end the run when an alarm rings")
    add("--dry_run", action="store_true", help="check everything, print what memory the run needs, and train nothing")
    add("--num_eval_images", default=0, help="pictures that metrics.json measures; 0 measures none")


def _add_hub(add) -> None:
    add("--push_to_hub", action="store_true", help="push the student to the Hub when it is done")
    add("--hub_model_id", help="the repository, USER/NAME or a name of your own; the output folder's by default")
    add("--hub_token", help="for teacher and student; that of `hf auth login` or HF_TOKEN by default; recorded nowhere")
    add("--hub_private_repo", action="store_true", default=None, help="let only you see a new repository")
    add("--hub_revision", help="the branch to push to, made if it is missing; main by default")
    add("--hub_commit_message", default="End of training", help="the first line of the commit")
    add("--hub_tag_checkpoints", action="store_true",
        help="before it, push the student of each checkpoint that is there, under a tag of its name")
# fmt: on


def parse_args(
    argv: Sequence[str] | None = None, description: str | None = None, student: str = "lora"
) -> argparse.Namespace:
    """Parses and checks; wrong arguments end the program with one sentence, before any long work."""
    parser = build_parser(description, student)
    refuse_secrets(parser, argv)
    given = parser.parse_known_args(argv)[0]
    name = given.pretrained_model_name_or_path
    if is_tiny(name):
        own = TINY_LORA_DEFAULTS if student == "lora" else TINY_FULL_DEFAULTS
        if given.mixed_precision != "no":
            own = {flag: value for flag, value in own.items() if flag != "fold_adapters"}  # float32 alone can be folded
        scale = REFERENCES[name].guidance_scale
        parser.set_defaults(**{**TINY_DEFAULTS, **own}, sample_guidance_scale=scale)
    args = parser.parse_within(BOUNDS, argv)
    args.command = command_line(f"train_rdm_{student}.py", sys.argv[1:] if argv is None else argv)
    try:
        hand_on_token(args)
        return fill_in(args)
    except (ValueError, ImportError) as error:
        parser.error(str(error))


def hand_on_token(args: argparse.Namespace) -> None:
    """Takes the token out of the arguments, which are recorded, and gives it to huggingface_hub.

    Raises:
        ValueError: if a tracker may record the command line.
    """
    token = args.hub_token
    del args.hub_token
    if token is None:
        return
    if args.report_to not in TOKEN_SAFE_TRACKERS:
        raise ValueError(
            f"--hub_token would be recorded by --report_to {args.report_to}, with the command line; leave it out and "
            "log in with `hf auth login`."
        )
    use_token(token)


def fill_in(args: argparse.Namespace) -> argparse.Namespace:
    """Fills in the defaults that depend on others, and checks all.

    Raises:
        ValueError: one sentence on what is wrong and what to do.
    """
    vars(args).update(with_full_names(vars(args)))  # for those who export a checkpoint from another folder
    args.num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    preset = args.preset or ALGORITHM_PRESETS[args.algorithm]
    for name, value in PRESETS[preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.fake_learning_rate is None:
        args.fake_learning_rate = args.learning_rate
    if args.student == "lora" and args.lora_alpha is None:
        args.lora_alpha = args.rank
    if args.sample_guidance_scale is None:
        args.sample_guidance_scale = args.guidance_scale
    if getattr(args, "lora_layers", None):
        args.lora_layers = ",".join(name.strip() for name in args.lora_layers.split(","))
    check_arguments(args)
    return args


def groups_per_update(args: argparse.Namespace) -> int:
    """Rollouts per update and process, in groups."""
    samples = args.train_batch_size * args.gradient_accumulation_steps
    return samples // (args.group_size * args.steps_per_rollout)


def make_objective(args: argparse.Namespace) -> GNDM:
    """The objective that the arguments name, without the rewards."""
    return GNDM(
        group_size=args.group_size,
        gndm_lambda=args.gndm_lambda,
        advantage_normalization=args.advantage_normalization,
        bias_estimator=args.bias_estimator,
        steps_per_rollout=args.steps_per_rollout,
        pool_steps=args.pool_steps,
    )
