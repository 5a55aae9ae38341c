#!/usr/bin/env python
"""Distils a text-to-image teacher into a few-step student with weights of its own, by matching distributions (R_dm).

    accelerate launch train_rdm_full.py  # the embedded tiny teacher
    accelerate launch train_rdm_full.py --pretrained_model=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --prompts_file prompts.txt --mixed_precision bf16 --gradient_checkpointing --use_8bit_adam --output_dir sd15

What it does, and the flags that steer it:
- student, fake score and teacher are separate networks; the trained two have float32 weights and compute in
  --mixed_precision; the teacher is kept in it, or in --teacher_quantization int8, fp8 or nf4
- method, rewards, prompts, health and checkpoints: all flags of train_rdm_lora.py but those of the LoRAs
- memory: --gradient_checkpointing, --use_8bit_adam, --train_batch_size with --gradient_accumulation_steps, --offload,
  --no-use_ema; over several GPUs: accelerate launch --use_fsdp --fsdp_version 2 (docs/many_gpus.md)
- what comes out is a whole stock pipeline, which diffusers loads by itself
- the Hub: --push_to_hub, --hub_model_id, --hub_token, --hub_private_repo, --hub_revision, --hub_commit_message,
  --hub_tag_checkpoints
"""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from rdm_diffusers.hub import export_full
from rdm_diffusers.networks import STUDENT
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
    make_full_networks,
    make_state,
    start_trackers,
    teacher_contrast,
)
from rdm_diffusers.training.teacher_checks import check_with_teacher
from rdm_diffusers.training.validation import averaged_student, validate


def main(argv: list[str] | None = None) -> None:
    # 1. Everything that can be wrong is checked before anything long is done.
    args = parse_args(argv, __doc__, student="full")
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

    # 2. The teacher; prompts, read once; the three roles, each a network.
    teacher = load(args, accelerator.device)
    texts = read_texts(teacher, prompts, args, accelerator)
    networks = make_full_networks(teacher, texts, args, accelerator)

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

    # 5. The student's files, a folder that stock diffusers loads.
    config = networks.denoisers[STUDENT].config
    export_full(output_dir, teacher, weights, config, run.scheduler, training)

    # 6. The student, loaded as anyone would load it, beside its teacher.
    del teacher, networks, run, state, draw, weights, config
    present(output_dir, texts.shown, args, accelerator.device)

    # 7. The student, on the Hub.
    publish(output_dir, args)


if __name__ == "__main__":
    run_program(main, MEMORY_FLAGS)
