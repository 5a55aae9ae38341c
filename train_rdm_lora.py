#!/usr/bin/env python
"""Distils a text-to-image teacher into a few-step LoRA student, by matching distributions as a reward (R_dm).

    accelerate launch train_rdm_lora.py  # the embedded tiny teacher
    accelerate launch train_rdm_lora.py --pretrained_model=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --prompts_file prompts.txt --mixed_precision bf16 --gradient_checkpointing --output_dir sd15-4step

What it does, and the flags that steer it:
- the objective: --algorithm gndm (group-normalised R_dm, the default), dmd (DMD2's), or gndmr with --reward
- the student: --num_student_steps, --eta, --rank, --lora_alpha, --lora_layers; its times: --student_timesteps,
  --student_sigmas or --student_grid
- the teacher, of any family in the README's table: --resolution 1216x832 or --aspect_ratio_buckets
  (docs/sizes.md), --max_sequence_length, --pretrained_vae_model_name_or_path; its guidance in R_dm: --guidance_scale
  (u + w (c - u), 1 is off)
- the target: the guided teacher's score, or with --teacher_target samples the score of its images, which a LoRA learns
  first: --num_target_images, --target_inference_steps, --target_train_steps, --target_learning_rate, --target_rank,
  --target_batch_size; --target_images_dir also writes them as pictures;
  your own images in it: --train_data_dir, or --dataset_name with --image_column; --caption_column, --target_weight,
  --center_crop, --random_flip
- guidance of that score by noise level: --guidance_interval, --decoupled_guidance; times of R_dm and of the fake score:
  --renoising_time_distribution, --fake_time_distribution, --logit_mean, --logit_std
- LoRAs to begin with (docs/sharing.md): the teacher's, --teacher_lora PATH_OR_ID[:scale], with --student_base plain or
  teacher; the student's, --init_lora
- groups: --preset, --group_size, --gndm_lambda, --bias_estimator, --pool_steps, --advantage_normalization,
  --num_renoisings
- external rewards: --reward name[=weights][:weight], your own file's or a server's; --reward_dtype, --reward_share,
  --reward_combination, --projection_guard; those without gradients: --reward_tilt; their course:
  --reward_scheduler, --reward_warmup_steps; their memory (docs/rewards.md): --decode_batch_size, --reward_vae
- the fake score: --fake_updates_per_step, --fake_learning_rate, --fake_score_steps
- the length, and rates by the batch (docs/many_gpus.md): --max_train_steps or --num_train_epochs; --scale_lr
- the length, and rates by the batch (docs/many_gpus.md): --max_train_steps or --num_train_epochs; --scale_lr
- rollouts: --steps_per_rollout, --reuse_rollouts, --importance_weighting
- health: --logging_steps, alarms in the log, --stop_on_collapse; --dry_run prints the memory needed, trains nothing
- small GPUs (docs/recipes.md): --base_quantization int8, fp8 or nf4, --mixed_precision bf16 or fp16, --optim,
  --use_8bit_adam, --gradient_checkpointing, --train_batch_size with --gradient_accumulation_steps, --offload,
  --enable_vae_tiling, --enable_vae_slicing
- speed: --fold_adapters, --torch_compile, --attention_backend, --enable_xformers_memory_efficient_attention,
  --channels_last
- several GPUs (docs/many_gpus.md): accelerate launch --multi_gpu, or --use_fsdp --fsdp_version 2; --ddp_timeout,
  --sync_each_batch
- prompts: --prompts_file, or --dataset_name with --caption_column, --dataset_split; --encode_prompts,
  --encode_batch_size, --cache_dir
- quality while it trains (docs/watching.md): --validation_metrics, --num_validation_metric_images,
  --validation_prompts_file, --reference_teacher, --reference_data, --features, --feature_weights; the best:
  --metric_for_best_model, --greater_is_better, --load_best_model_at_end; --early_stopping_patience,
  --early_stopping_threshold; everything on one page: report.html
- checkpoints: --checkpointing_steps, --resume_from_checkpoint latest; signals save one too (docs/clusters.md)
- the Hub: --push_to_hub, --hub_model_id, --hub_token, --hub_private_repo, --hub_revision, --hub_commit_message,
  --hub_tag_checkpoints
"""

from __future__ import annotations

import sys

import rdm_diffusers.quiet  # noqa: F401 - before the packages that it quietens
from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.program import run_program, status_of
from rdm_diffusers.training.launch import MEMORY_FLAGS
from rdm_diffusers.training.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    config = parse_args(argv, __doc__)
    with Trainer(config) as trainer:
        # 1. Everything that can be wrong is found before anything long is done.
        trainer.check()
        if config.output.dry_run:
            print(trainer.plan().as_table())
            return

        # 2. The teacher; prompts, read once; the roles and their target; the objective, optimisers, the moving average.
        trainer.load()

        # 3. The training. A signal saves a checkpoint and ends the program, so that nothing waits for a student.
        output = trainer.train()
        if output.signal:
            sys.exit(status_of(output.signal))

        # 4. The student's files, which stock diffusers loads; the student beside its teacher; the student on the Hub.
        trainer.export()
        trainer.evaluate()
        if config.hub.push_to_hub:
            trainer.push()


if __name__ == "__main__":
    run_program(main, MEMORY_FLAGS)
