"""Writes the cards of `waiting/`: of students that nobody has trained yet, each with the command that would.

    python model_cards/make_cards.py

They come from the same template and code as every student's card; `tests/test_cards.py` keeps them fresh.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from diffusers import DDIMScheduler

from rdm_diffusers.config.command_line import parse_args
from rdm_diffusers.config.record import training_record
from rdm_diffusers.families import FAMILIES
from rdm_diffusers.hub.card import CardFacts, render
from rdm_diffusers.pipelines import StudentConfig

FOLDER = Path(__file__).parent / "waiting"
STABILITY = {
    "license": "other", "license_name": "stabilityai-ai-community",
    "license_link": "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md",
}  # fmt: skip
FLUX_DEV = {
    "license": "other", "license_name": "flux-1-dev-non-commercial-license",
    "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
}  # fmt: skip
USUAL = "--prompts_file prompts.txt --mixed_precision bf16 --use_8bit_adam --gradient_checkpointing --offload"

# name             stock pipeline              licence                               arguments
STUDENTS = {
    "sd15-4step": ("StableDiffusionPipeline", {"license": "creativeml-openrail-m"},
                   "--pretrained_model stable-diffusion-v1-5/stable-diffusion-v1-5 --guidance_scale 7.5"),
    "sdxl-4step": ("StableDiffusionXLPipeline", {"license": "openrail++"},
                   "--pretrained_model stabilityai/stable-diffusion-xl-base-1.0 --guidance_scale 7.5"),
    "sd35-medium-4step": ("StableDiffusion3Pipeline", STABILITY,
                          "--pretrained_model stabilityai/stable-diffusion-3.5-medium --guidance_scale 4.5"),
    "flux-dev-4step": ("FluxPipeline", FLUX_DEV,
                       "--pretrained_model black-forest-labs/FLUX.1-dev --guidance_scale 3.5 --base_quantization nf4"),
}  # fmt: skip


def waiting_card(name: str) -> str:
    """The card of a student that is not trained yet."""
    pipeline_class, license_tags, own = STUDENTS[name]
    args = parse_args(shlex.split(f"{own} {USUAL} --output_dir {name} --push_to_hub"))
    told = args.method.guidance_scale if pipeline_class == "FluxPipeline" else 0.0  # FLUX.1-dev is told its guidance
    stock = FAMILIES[pipeline_class].stock_scheduler(DDIMScheduler(), args.method.num_student_steps, args.method.eta)
    student = StudentConfig(
        base_model_name_or_path=args.teacher.pretrained_model_name_or_path,
        pipeline_class=pipeline_class,
        scheduler={"eta": args.method.eta},
        num_inference_steps=args.method.num_student_steps,
        call_arguments={"guidance_scale": told},
        license=license_tags,
        training=training_record(
            args.as_arguments() | {"command": args.command, "num_processes": 1}, args.optimisation.max_train_steps
        ),
    )
    scheduler = {**stock.config, "_class_name": type(stock).__name__}
    comfyui = f"comfyui/{name}.safetensors"
    facts = CardFacts(f"your-name/{name}", student, scheduler, comfyui=comfyui, trained=False)
    return str(render(facts))


def main() -> None:
    """Writes them all."""
    FOLDER.mkdir(exist_ok=True)
    for name in STUDENTS:
        (FOLDER / f"{name}.md").write_text(waiting_card(name))


if __name__ == "__main__":
    main()
