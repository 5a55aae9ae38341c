"""What each flag of a run takes, but for those whose choices the parser itself names."""

from __future__ import annotations

from accelerate.utils import LoggerType
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.optimization import SchedulerType
from torch._dynamo import list_backends

from ..bounds import (
    COUNT,
    FREE_TEXT,
    GUIDANCE,
    MANY,
    MODEL,
    PATH,
    PLACE_INSIDE,
    REVISION,
    SEED,
    SIDE,
    STEPS,
    TOKEN,
    TOKENS,
    VARIANT,
    Bound,
    OneOf,
    Text,
    real,
    whole,
)

BATCH = whole("[1, 65536]")
ETA = real("[0, 1]", says="be 1 or 0, because no stock scheduler samples in between")
FACTOR = whole("[1, 1000]")
RATE = real("(0, inf)")
SHARE = real("[0, 1]", says="lie in [0, 1), or be 1 with --projection_guard")
SCHEDULES = tuple(kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT)
TRACKERS = (*(kind.value for kind in LoggerType), "none")
BACKENDS = tuple(kind.value for kind in AttentionBackendName)


def compilers() -> tuple[str, ...]:
    """What torch can compile with here."""
    return tuple(name for name in list_backends(exclude_tags=()) if not name.endswith("TESTING_ONLY"))


# fmt: off
BOUNDS: dict[str, Bound] = {
    # teacher and prompts
    "pretrained_model_name_or_path":     MODEL,
    "pretrained_vae_model_name_or_path": Text("a folder or a Hub id"),
    "revision":                          REVISION,
    "variant":                           VARIANT,
    "prompts_file":                      PATH,
    "dataset_name":                      Text("a folder or a Hub id"),
    "dataset_config_name":               Text("the name of a configuration"),
    "dataset_split":                     Text("a split, or a slice of one, for example train[:1000]"),
    "caption_column":                    Text("the name of a column"),
    "max_train_samples":                 COUNT,
    "cache_dir":                         PATH,
    "max_sequence_length":               TOKENS,
    "resolution":                        SIDE,
    # method
    "num_student_steps":                 STEPS,
    "eta":                               ETA,
    "guidance_scale":                    GUIDANCE,
    "sample_guidance_scale":             GUIDANCE,
    "group_size":                        BATCH,
    "gndm_lambda":                       real("[0, 1]"),
    "pool_steps":                        real("[0, 1]"),
    "num_renoisings":                    FACTOR,
    "fake_updates_per_step":             whole("[0, 1000]"),
    "steps_per_rollout":                 STEPS,
    "reuse_rollouts":                    FACTOR,
    # rewards
    "reward":                            Text("a reward's name or path/to/file.py:function"),
    "reward_share":                      SHARE,
    "reward_tilt":                       real("(0, inf)"),
    # student
    "rank":                              whole("[1, 8192]"),
    "lora_alpha":                        whole("[1, 100000]"),
    "lora_layers":                       Text("names of modules with commas between them"),
    # optimisation
    "train_batch_size":                  BATCH,
    "gradient_accumulation_steps":       BATCH,
    "max_train_steps":                   COUNT,
    "learning_rate":                     RATE,
    "fake_learning_rate":                RATE,
    "lr_scheduler":                      OneOf(SCHEDULES),
    "lr_warmup_steps":                   whole(f"[0, {MANY}]"),
    "adam_beta1":                        real("[0, 1)"),
    "adam_beta2":                        real("[0, 1)"),
    "adam_weight_decay":                 real("[0, inf)"),
    "adam_epsilon":                      real("(0, inf)"),
    "max_grad_norm":                     real("[0, inf)"),
    "ema_decay":                         real("[0, 1)"),
    "seed":                              SEED,
    # memory and speed
    "mixed_precision":                   OneOf(("no", "bf16"), ": fp16 would need its losses scaled"),
    "attention_backend":                 OneOf(BACKENDS),
    "torch_compile_backend":             OneOf(compilers),
    # output
    "output_dir":                        PATH,
    "logging_dir":                       PLACE_INSIDE,
    "report_to":                         OneOf(TRACKERS),
    "tracker_project_name":              PLACE_INSIDE,
    "checkpointing_steps":               COUNT,
    "checkpoints_total_limit":           COUNT,
    "resume_from_checkpoint":            Text("a checkpoint's folder, or `latest`"),
    "validation_prompt":                 FREE_TEXT,
    "num_validation_images":             whole("[1, 1000]"),
    "validation_steps":                  COUNT,
    "monitor_images":                    whole("[0, 10000]"),
    "num_eval_images":                   whole("[2, 1000000]", also=(0,)),  # a covariance needs two pictures
    # hub
    "hub_model_id":                      Text("NAME or USER/NAME"),
    "hub_token":                         TOKEN,
    "hub_revision":                      REVISION,
    "hub_commit_message":                FREE_TEXT,
}
# fmt: on
