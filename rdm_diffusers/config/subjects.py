"""What a run is configured by: a frozen dataclass a subject, in the names of the diffusers example scripts.

A field whose default is None gets its value from other fields (`presets.py`), so that it is there in a `RunConfig`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from accelerate.utils import LoggerType
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.optimization import SchedulerType
from torch._dynamo import list_backends

from ..bounds import (
    COUNT,
    FOLDER_OR_ID,
    FREE_TEXT,
    GUIDANCE,
    MANY,
    PATH,
    PLACE_INSIDE,
    REVISION,
    SEED,
    STEPS,
    OneOf,
    Text,
    real,
    whole,
)
from ..distillation import BIAS_ESTIMATORS, COMBINATIONS, F_DIVERGENCES, IMPORTANCE_WEIGHTINGS, NORMALIZATIONS
from .discriminator import USUAL_WEIGHT
from .fields import flag
from .optimizers import OPTIMIZERS, USUAL
from .presets import ALGORITHM_PRESETS, PRESETS

BATCH = whole("[1, 65536]")
ETA = real("[0, 1]", says="be 1 or 0, because no stock scheduler samples in between")
FACTOR = whole("[1, 1000]")
ON_THE_FLY = "on_the_fly"
RATE = real("(0, inf)")
OPTIMS = tuple(OPTIMIZERS)
SHARE = real("[0, 1]", says="lie in [0, 1), or be 1 with --projection_guard")
SCHEDULES = tuple(kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT)
TRACKERS = (*(kind.value for kind in LoggerType), "none")
BACKENDS = tuple(kind.value for kind in AttentionBackendName)


def compilers() -> tuple[str, ...]:
    """What torch can compile with here."""
    return tuple(name for name in list_backends(exclude_tags=()) if not name.endswith("TESTING_ONLY"))


# fmt: off
@dataclass(frozen=True)
class PromptsConfig:
    """Where the prompts come from, and the images, if there are any."""

    prompts_file: str | None = flag(None, "text file with one prompt a line, in UTF-8", PATH, is_path=True)
    dataset_name: str | None = flag(
        None, "dataset whose captions are the prompts: a Hub id, a folder (of data files, or by save_to_disk), or one "
        "csv, json, jsonl, parquet, arrow or txt file", FOLDER_OR_ID, is_path=True)
    train_data_dir: str | None = flag(
        None, "folder of images for the target, with their captions in metadata.jsonl or .csv", PATH, is_path=True)
    image_column: str | None = flag(
        None, "column of --dataset_name with images for the target; not used by default", Text("the name of a column"))
    dataset_config_name: str | None = flag(None, "the dataset's configuration", Text("the name of a configuration"))
    dataset_split: str = flag(
        "train", "the dataset's split, or a slice of one, for example validation or train[:1000]",
        Text("a split, or a slice of one, for example train[:1000]"), "--dataset_split_name", "--dataset_train_split")
    caption_column: str = flag(
        "text", "the dataset's column of captions; all of a row with several", Text("the name of a column"))
    max_train_samples: int | None = flag(None, "use only so many prompts, or images with theirs", COUNT)
    cache_dir: str | None = flag(
        None, "where prompt embeddings are cached; by default beside the datasets' cache", PATH, free=True,
        is_path=True)
    encode_prompts: str = flag(
        "cached", "cached: all prompts are encoded once, onto the disk; on_the_fly: each when it is needed, by text "
        "encoders that stay on the device, or with --offload come and go", OneOf(("cached", ON_THE_FLY)), free=True)
    encode_batch_size: int = flag(8, "prompts that the text encoders read at once", BATCH, free=True)


@dataclass(frozen=True)
class MethodConfig:
    """The objective, the student's sampler, the fake score, and the rollouts."""

    algorithm: str = flag(
        "gndm", "dmd: DMD2's objective; gndm: group-normalised R_dm; gndmr: gndm and external rewards; the others: see "
        "docs/family.md", OneOf(tuple(ALGORITHM_PRESETS)))
    preset: str | None = flag(
        None, "a variant by name, see the table of presets in docs/method.md; the algorithm's by default",
        OneOf(tuple(PRESETS)))
    num_student_steps: int = flag(4, "network calls of the student, 1 to 8 recommended", STEPS)
    eta: float = flag(1.0, "the student's stochasticity: 1 re-noises, 0 is deterministic", ETA)
    guidance_scale: float = flag(7.5, "the teacher's w in R_dm: u + w (c - u); 1 is off", GUIDANCE)
    sample_guidance_scale: float = flag(
        None, "the teacher's w where it is sampled for samples.png and metrics.json; --guidance_scale by default",
        GUIDANCE, free=True)
    group_size: int = flag(4, "G, samples of one prompt that share statistics", BATCH)
    gndm_lambda: float = flag(
        None, "strength of GNDM's bias correction; the preset's by default", real("[0, 1]"))
    bias_estimator: str = flag(
        "shift", "how a group's residuals make a bias: as a shift of the student's mean, or in noise units",
        OneOf(BIAS_ESTIMATORS))
    pool_steps: float = flag(
        0.5, "share of the bias that is measured over all trained states of a rollout, not at its step alone",
        real("[0, 1]"))
    advantage_normalization: str = flag(
        None, "what R_dm is divided by; the preset's by default", OneOf(NORMALIZATIONS))
    f_divergence: str | None = flag(
        None, "of f_distill and uni_instruct; jensen_shannon and reverse_kl by default", OneOf(F_DIVERGENCES))
    gen_cls_loss_weight: float = flag(
        None, "weight of the discriminator's verdict on the student's samples, beside R_dm; 0 is off, the default but "
        "for dmd2 and f_distill", real("[0, inf)"))
    guidance_cls_loss_weight: float = flag(
        USUAL_WEIGHT, "weight of the discriminator's own loss, beside the fake score's", real("(0, inf)"))
    sid_alpha: float = flag(
        1.0, "alpha of --algorithm sid: how much of the squared difference of the scores its loss takes off",
        real("[-10, 10]"))
    sim_c: float = flag(
        0.1, "c of --algorithm sim: the root mean square of the difference of the scores' x0 above which its distance "
        "grows like a norm, not like a square", RATE)
    num_renoisings: int = flag(1, "re-noised copies of each sample that estimate R_dm", FACTOR)
    fake_updates_per_step: int = flag(
        None, "fake-score updates per student update; the preset's by default", whole("[0, 1000]"))
    fake_score_unconditional: bool = flag(
        False, "give the fake score the empty prompt; with --guidance_scale 1 this is few-step SiD's Zero-CFG")
    fake_score_steps: bool = flag(False, "tell the fake score which student step a sample comes from")
    steps_per_rollout: int = flag(1, "how many states of each rollout are trained on, chosen at random", STEPS)
    reuse_rollouts: int = flag(None, "updates that one rollout serves; the preset's by default", FACTOR)
    importance_weighting: str = flag(
        "none", "how reused rollouts are weighed by their likelihood now", OneOf(IMPORTANCE_WEIGHTINGS))
    num_ddim_timesteps: int = flag(
        50, "of lcm: steps of the teacher's solver from noise to an image, of which each update takes one", STEPS)
    huber_c: float = flag(0.001, "of lcm: differences of x0 well below it count as their squares", RATE)


@dataclass(frozen=True)
class RewardsConfig:
    """External rewards, for `--algorithm gndmr`."""

    reward: tuple[str, ...] = flag(
        (), "name[=weights][:weight], path/to/file.py:function[:weight] or http://host:port/path[:weight], repeatable; "
        "a Python file is executed",
        Text("a reward's name, path/to/file.py:function or http://host:port/path"), is_path=True)
    reward_dtype: str = flag(
        "float32", "of the weights of pretrained rewards; bfloat16 halves their memory",
        OneOf(("float32", "bfloat16", "float16")))
    reward_share: float = flag(0.2, "rho, size of the rewards' part beside R_dm, 0 to 1", SHARE)
    reward_combination: str = flag(
        "share", "share: normalised, with --reward_share; sum: DMDR's plain weighted sum of losses",
        OneOf(COMBINATIONS))
    projection_guard: bool = flag(False, "drop what of the rewards' part opposes R_dm")
    reward_vae: str | None = flag(
        None, "decode with this AutoencoderTiny for the rewards alone, for example madebyollin/taesd: a folder or a "
        "Hub id", FOLDER_OR_ID, is_path=True)
    reward_tilt: float = flag(
        0.25, "kappa, by how many of their standard deviations rewards without gradients are to rise, about", RATE)
    reward_scheduler: str = flag(
        "constant", "how strong the rewards are after their warm-up: as strong to the end, or falling to 0 there",
        OneOf(("constant", "linear", "cosine")))
    reward_warmup_steps: int = flag(0, "updates in which the rewards' strength rises from 0", whole(f"[0, {MANY}]"))


@dataclass(frozen=True)
class OptimisationConfig:
    """Batches, learning rates and what else decides the course of the training."""

    train_batch_size: int = flag(4, "samples per device in one forward and backward", BATCH)
    gradient_accumulation_steps: int = flag(1, "such batches per update; groups may span them", BATCH)
    max_train_steps: int = flag(5000, "student updates; overrides --num_train_epochs", COUNT, free=True)
    num_train_epochs: int | None = flag(
        None, "passes over the prompts, each of which has one group in a pass, instead of --max_train_steps", COUNT,
        free=True)
    learning_rate: float = flag(1e-4, "the student's", RATE, free=True)
    scale_lr: bool = flag(
        False, "multiply both learning rates by --train_batch_size x --gradient_accumulation_steps x processes",
        free=True)
    fake_learning_rate: float = flag(None, "the fake score's; the student's by default", RATE, free=True)
    lr_scheduler: str = flag(
        "constant", "as in diffusers: constant, cosine, linear, ...", OneOf(SCHEDULES))
    lr_warmup_steps: int = flag(0, "updates of warm-up", whole(f"[0, {MANY}]"))
    adam_beta1: float = flag(0.9, "of both optimisers", real("[0, 1)"))
    adam_beta2: float = flag(0.999, "of both optimisers", real("[0, 1)"))
    adam_weight_decay: float = flag(1e-2, "of both optimisers", real("[0, inf)"))
    adam_epsilon: float = flag(1e-8, "of both optimisers", real("(0, inf)"))
    max_grad_norm: float = flag(
        1.0, "gradients are clipped to this norm, each role by itself; 0 clips nothing", real("[0, inf)"), free=True)
    use_ema: bool = flag(True, "export the moving average of the student's weights")
    ema_decay: float = flag(
        0.99, "share of the average that an update leaves; before, n / (n + 9) at update n", real("[0, 1)"))
    seed: int = flag(0, "decides every random number of the run", SEED)

    @property
    def samples_per_update(self) -> int:
        """Samples of one process in one update."""
        return self.train_batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True)
class MemoryConfig:
    """Memory and speed: nothing here changes a result beyond rounding, but for tiles, whose seams are blended."""

    mixed_precision: str = flag(
        lambda: os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        "no, bf16 or fp16: dtype of frozen weights and of computation; what is trained stays float32; fp16, for cards "
        "without bf16, scales its gradients", OneOf(("no", "bf16", "fp16")))
    use_8bit_adam: bool = flag(False, "8-bit AdamW for both roles: bitsandbytes', or else torchao's")
    optim: str = flag(USUAL, "the AdamW of both roles, by transformers' names; see docs/hardware.md", OneOf(OPTIMS))
    gradient_checkpointing: bool = flag(False, "less memory for more time", free=True)
    offload: bool = flag(
        False, "keep off the device what is not at work: the moving average, the rewards with their autoencoder, and "
        "at the run's end every network", free=True)
    decode_batch_size: int = flag(
        None, "pictures that are decoded and scored at once for the rewards, or encoded for the target; "
        "--train_batch_size by default", BATCH, free=True)
    enable_vae_slicing: bool = flag(False, "decode pictures one by one", free=True)
    enable_vae_tiling: bool = flag(
        False, "decode large pictures in tiles; where tiles overlap, pictures differ a little", free=True)
    enable_xformers_memory_efficient_attention: bool = flag(False, "xformers' attention, for U-Nets", free=True)
    attention_backend: str | None = flag(
        None, "attention of a transformer by its name in diffusers, for example flash", OneOf(BACKENDS), free=True)
    torch_compile: bool = flag(False, "compile the blocks that the network repeats", free=True)
    torch_compile_backend: str = flag("inductor", "what compiles them", OneOf(compilers), free=True)
    channels_last: bool = flag(
        False, "lay out the frozen convolutions of a U-Net as channels last", free=True)
    allow_tf32: bool = flag(False, "faster float32 on Ampere and later", free=True)
    sync_each_batch: bool = flag(
        False, "with FSDP2, average gradients after every micro-batch, which needs less memory and more time, and not "
        "only after the last", free=True)
    ddp_timeout: int = flag(
        7200, "seconds that a process waits for another, for example for one that reads prompts or writes a checkpoint",
        whole("[1, 1000000]"), free=True)


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes, and when."""

    output_dir: str = flag(
        "rdm-student", "where the student, its card and the checkpoints go", PATH, free=True, is_path=True)
    logging_dir: str = flag(
        "logs", "trackers' folder inside the output folder", PLACE_INSIDE, free=True, is_path=True)
    report_to: str = flag("tensorboard", "a tracker that accelerate knows, all, or none", OneOf(TRACKERS), free=True)
    logging_steps: int = flag(10, "updates between two rows of the tracker", COUNT, free=True)
    tracker_project_name: str = flag(None, "the trackers' name of the project", PLACE_INSIDE, free=True)
    checkpointing_steps: int = flag(500, "updates between checkpoints", COUNT, free=True)
    checkpoints_total_limit: int | None = flag(None, "keep at most so many checkpoints", COUNT, free=True)
    resume_from_checkpoint: str | None = flag(
        None, "a checkpoint folder, or `latest`", Text("a checkpoint's folder, or `latest`"), free=True)
    validation_prompt: tuple[str, ...] = flag(
        (), "prompt of the picture grid, repeatable; some of the prompts else", FREE_TEXT, free=True)
    num_validation_images: int = flag(8, "pictures in each row", whole("[1, 1000]"), free=True)
    validation_steps: int = flag(200, "updates between picture grids", COUNT, free=True)
    monitor_images: int = flag(
        8, "pictures of the teacher that the student's contrast is compared with; 0 compares none",
        whole("[0, 10000]"), free=True)
    stop_on_collapse: bool = flag(False, "end the run when an alarm rings", free=True)
    dry_run: bool = flag(False, "check everything, print what memory the run needs, and train nothing", free=True)
    target_images_dir: str | None = flag(
        None, "a folder for the teacher's images that the target learns from, as PNG files with their prompts, for "
        "rdm-evaluate --reference_teacher; written only if it is given", PATH, free=True, is_path=True)
    num_eval_images: int = flag(
        0, "pictures that metrics.json measures; 0 measures none", whole("[2, 1000000]", also=(0,)),
        free=True)  # a covariance needs two pictures


@dataclass(frozen=True)
class HubConfig:
    """Where the student is pushed. The token is no part of a configuration, which is recorded."""

    push_to_hub: bool = flag(False, "push the student to the Hub when it is done", free=True)
    hub_model_id: str | None = flag(
        None, "the repository, USER/NAME or a name of your own; the output folder's by default",
        Text("NAME or USER/NAME"), free=True)
    hub_private_repo: bool | None = flag(None, "let only you see a new repository", free=True)
    hub_revision: str | None = flag(
        None, "the branch to push to, made if it is missing; main by default", REVISION, free=True)
    hub_commit_message: str = flag("End of training", "the first line of the commit", FREE_TEXT, free=True)
    hub_tag_checkpoints: bool = flag(
        False, "before it, push the student of each checkpoint that is there, under a tag of its name", free=True)
# fmt: on
