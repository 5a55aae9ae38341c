#!/usr/bin/env python
"""Distils a text-to-image teacher into a few-step student with weights of its own, by matching distributions (R_dm).

    accelerate launch train_rdm_full.py  # the embedded tiny teacher
    accelerate launch train_rdm_full.py --pretrained_model=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --prompts_file prompts.txt --mixed_precision bf16 --gradient_checkpointing --use_8bit_adam --output_dir sd15

What it does, and the flags that steer it:
- student, fake score and teacher are separate networks; the trained two have float32 weights and compute in
  --mixed_precision; the teacher is kept in it, or in --teacher_quantization int8, fp8 or nf4
- method, rewards, prompts, health and checkpoints: all flags of train_rdm_lora.py but those of the LoRAs
- LoRAs in the teacher's weights (docs/sharing.md): --teacher_lora PATH_OR_ID[:scale]
- memory: --gradient_checkpointing, --use_8bit_adam or --optim, --train_batch_size with
  --gradient_accumulation_steps, --offload, --no-use_ema, --enable_vae_tiling, --enable_vae_slicing; over several GPUs
  (docs/many_gpus.md): accelerate launch --use_fsdp --fsdp_version 2, --ddp_timeout, --sync_each_batch
- what comes out is a whole stock pipeline, which diffusers loads by itself
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
    config = parse_args(argv, __doc__, student="full")
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
