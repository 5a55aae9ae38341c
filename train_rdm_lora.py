#!/usr/bin/env python
"""Distils a text-to-image teacher into a few-step LoRA student, by matching distributions as a reward (R_dm).

    accelerate launch train_rdm_lora.py  # the embedded tiny teacher
    accelerate launch train_rdm_lora.py --pretrained_model=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --prompts_file prompts.txt --mixed_precision bf16 --gradient_checkpointing --output_dir sd15-4step

What it does, and the flags that steer it:
- the objective: --algorithm gndm (group-normalised R_dm, the default), dmd (DMD2's), or gndmr with --reward
- the student: --num_student_steps, --eta, --rank, --lora_alpha, --lora_layers
- the teacher, of any family in the README's table: --resolution, --max_sequence_length,
  --pretrained_vae_model_name_or_path; its guidance in R_dm: --guidance_scale (u + w (c - u), 1 is off)
- groups: --preset, --group_size, --gndm_lambda, --bias_estimator, --pool_steps, --advantage_normalization,
  --num_renoisings
- external rewards: --reward name[=weights][:weight], --reward_dtype, --reward_share, --reward_combination,
  --projection_guard; those without gradients: --reward_tilt
- the fake score: --fake_updates_per_step, --fake_learning_rate, --fake_score_steps
- rollouts: --steps_per_rollout, --reuse_rollouts, --importance_weighting
- health: alarms in the log, --stop_on_collapse; --dry_run prints what memory is needed and trains nothing
- small GPUs (docs/recipes.md): --base_quantization int8, fp8 or nf4, --mixed_precision bf16, --use_8bit_adam,
  --gradient_checkpointing, --train_batch_size with --gradient_accumulation_steps, --offload
- speed: --fold_adapters, --torch_compile, --attention_backend, --enable_xformers_memory_efficient_attention
- several GPUs (docs/many_gpus.md): accelerate launch --multi_gpu, or --use_fsdp --fsdp_version 2
- prompts, no images: --prompts_file, or --dataset_name with --caption_column, --dataset_split
- checkpoints: --checkpointing_steps, --resume_from_checkpoint latest; Ctrl-C, SIGTERM and SIGHUP save one too
- the Hub: --push_to_hub, --hub_model_id, --hub_token, --hub_private_repo, --hub_revision, --hub_commit_message,
  --hub_tag_checkpoints
"""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from rdm_diffusers.hub import export_lora
from rdm_diffusers.program import run_program, status_of
from rdm_diffusers.training.arguments import parse_args
from rdm_diffusers.training.checkpoints import read_arguments
from rdm_diffusers.training.checks import check_resumable, prepare_output
from rdm_diffusers.training.external_rewards import load_rewards
from rdm_diffusers.training.finish import present
from rdm_diffusers.training.launch import MEMORY_FLAGS, make_accelerator
from rdm_diffusers.training.loop import train
from rdm_diffusers.training.memory_plan import plan_memory
from rdm_diffusers.training.prompts import load_prompts, read_texts
from rdm_diffusers.training.publish import check_hub, publish
from rdm_diffusers.training.record import training_record
from rdm_diffusers.training.run_folder import alone_in, checkpoint_to_resume, go_on_from
from rdm_diffusers.training.setup import (
    end_trackers,
    load,
    make_distillation,
    make_lora_networks,
    make_state,
    start_trackers,
    teacher_contrast,
)
from rdm_diffusers.training.teacher_checks import check_with_teacher
from rdm_diffusers.training.validation import averaged_student, validate


def main(argv: list[str] | None = None) -> None:
    # 1. Everything that can be wrong is checked before anything long is done.
    args = parse_args(argv, __doc__)
    output_dir = prepare_output(args)
    accelerator = make_accelerator(args)
    with alone_in(output_dir, args, accelerator):
        distil(args, output_dir, accelerator)


def distil(args: Namespace, output_dir: Path, accelerator: Accelerator) -> None:
    checkpoint = checkpoint_to_resume(output_dir, args)
    prompts = load_prompts(args)
    if checkpoint:
        check_resumable(args, read_arguments(checkpoint))
    check_with_teacher(args)
    check_hub(args, accelerator)
    rewards = load_rewards(args, accelerator.device)
    if args.dry_run:
        print(plan_memory(args).as_table())
        return

    # 2. The teacher; prompts, read once; the three roles on its network.
    teacher = load(args, accelerator.device)
    texts = read_texts(teacher, prompts, args, accelerator)
    networks = make_lora_networks(teacher, texts, args, accelerator)

    # 3. The objective, the student's sampler; optimisers and the moving average.
    run = make_distillation(teacher, networks, texts, rewards, args, accelerator)
    state = make_state(networks, accelerator, args)
    state.monitor.teacher_contrast = teacher_contrast(run, teacher, args.monitor_images)
    if checkpoint:
        go_on_from(checkpoint, output_dir, state, accelerator)

    # 4. Training.
    start_trackers(accelerator, args)
    draw = partial(validate, run=run, state=state, teacher=teacher, texts=texts, args=args, accelerator=accelerator)
    interrupted = train(run, state, args, accelerator, draw)
    if interrupted:
        end_trackers(accelerator)
        sys.exit(status_of(interrupted))  # so that nothing that waits for the student goes on
    with averaged_student(run, state):
        weights = networks.student_weights()
    training = training_record(args, state.update)
    end_trackers(accelerator)
    if not accelerator.is_main_process:
        return

    # 5. The student's files, in formats that stock diffusers loads.
    origin = {"revision": args.revision, "variant": args.variant, "training": training}
    export_lora(output_dir, teacher, weights, run.scheduler, **origin)

    # 6. The student, loaded as anyone would load it, beside its teacher.
    del teacher, networks, run, state, draw, weights
    present(output_dir, texts.shown, args, accelerator.device)

    # 7. The student, on the Hub.
    publish(output_dir, args)


if __name__ == "__main__":
    run_program(main, MEMORY_FLAGS)
