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
- external rewards: --reward name[:weight], --reward_share, --reward_combination, --projection_guard; those without
  gradients: --reward_tilt, --black_box_form
- the fake score: --fake_updates_per_step, --fake_learning_rate, --fake_score_steps
- rollouts: --steps_per_rollout, --reuse_rollouts, --importance_weighting
- health: alarms in the log, --stop_on_collapse; --dry_run prints what memory is needed and trains nothing
- memory and speed: --gradient_accumulation_steps, --gradient_checkpointing, --mixed_precision, --use_8bit_adam,
  --fold_adapters
- prompts, no images: --prompts_file, or --dataset_name with --caption_column
- checkpoints: --checkpointing_steps, --resume_from_checkpoint latest; Ctrl-C saves one too
"""

from __future__ import annotations

import sys
from functools import partial

from rdm_diffusers.evaluation import as_table, save_samples, tiny_metrics, write_metrics
from rdm_diffusers.families import load_teacher
from rdm_diffusers.hub import export_lora, write_card
from rdm_diffusers.pipelines import RdmDistillationPipeline
from rdm_diffusers.tiny import is_tiny
from rdm_diffusers.training.arguments import parse_args
from rdm_diffusers.training.checkpoints import find_checkpoint, load_checkpoint, read_arguments
from rdm_diffusers.training.checks import check_resumable, prepare_output
from rdm_diffusers.training.loop import train
from rdm_diffusers.training.memory_plan import plan_memory
from rdm_diffusers.training.monitor import CollapseError
from rdm_diffusers.training.optimizers import NonFiniteError
from rdm_diffusers.training.prompts import load_prompts
from rdm_diffusers.training.setup import (
    DTYPES,
    load_rewards,
    make_accelerator,
    make_distillation,
    make_networks,
    make_state,
    prompt_options,
    teacher_contrast,
)
from rdm_diffusers.training.validation import averaged_student, spread, validate


def main(argv: list[str] | None = None) -> None:
    # 1. Everything that can be wrong is checked before anything long is done.
    args = parse_args(argv, __doc__)
    output_dir = prepare_output(args)
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    if checkpoint:
        check_resumable(args, read_arguments(checkpoint))
    prompts = load_prompts(args)
    accelerator = make_accelerator(args)
    rewards = load_rewards(args, accelerator.device)

    if args.dry_run:
        print(plan_memory(args, prompt_options(args), DTYPES[args.mixed_precision]).as_table())
        return

    # 2. The teacher, and the three roles on its network.
    teacher = load_teacher(
        args.pretrained_model_name_or_path,
        DTYPES[args.mixed_precision],
        args.revision,
        args.variant,
        prompt_options(args),
        args.pretrained_vae_model_name_or_path,
    )
    teacher.pipeline.to(accelerator.device)
    networks = make_networks(teacher, args)

    # 3. Prompts (encoded once), the objective, the student's sampler; optimisers and the moving average.
    run = make_distillation(teacher, networks, prompts, rewards, args, accelerator)
    state = make_state(networks, accelerator, args)
    state.monitor.teacher_contrast = teacher_contrast(teacher, prompts, args)
    if checkpoint:
        load_checkpoint(checkpoint, state)

    # 4. Training.
    accelerator.init_trackers(
        args.tracker_project_name,
        config={name: value for name, value in vars(args).items() if isinstance(value, int | float | str)},
    )
    finished = train(
        run, state, args, accelerator,
        partial(validate, run=run, state=state, teacher=teacher, args=args, accelerator=accelerator),
    )  # fmt: skip
    accelerator.end_training()
    if not finished or not accelerator.is_main_process:
        return

    # 5. The student's files, in formats that stock diffusers loads.
    with averaged_student(run, state):
        export_lora(output_dir, teacher, networks, run.scheduler, revision=args.revision, variant=args.variant)

    # 6. The student, loaded as anyone would load it, beside its teacher.
    stock = load_teacher(
        args.pretrained_model_name_or_path,
        DTYPES[args.mixed_precision],
        args.revision,
        args.variant,
        vae=args.pretrained_vae_model_name_or_path,
    )
    student = RdmDistillationPipeline.from_pretrained(output_dir, dtype=DTYPES[args.mixed_precision])
    for pipeline in (stock.pipeline, student):
        pipeline.to(accelerator.device)
    examples = spread(args.validation_prompt or prompts, args.num_validation_images)
    metrics = save_samples(output_dir / "samples.png", stock.pipeline, student, args.sample_guidance_scale, examples)
    if is_tiny(teacher.name) and args.num_eval_images:
        metrics = tiny_metrics(stock.pipeline, student, args.sample_guidance_scale, args.num_eval_images, teacher.name)
    write_metrics(output_dir / "metrics.json", metrics, vars(args))
    table = as_table(metrics)
    write_card(output_dir, teacher.family.pipeline_class.__name__, table, examples[0], args)
    print(f"\n{table}\n\nLoad the student with RdmDistillationPipeline.from_pretrained({str(output_dir)!r}).")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError, NonFiniteError, CollapseError) as error:
        sys.exit(f"error: {error}")
