"""What decoding and scoring takes beside all weights, for Stable Diffusion XL at 1024 pixels with HPSv2, in bfloat16.

    python benchmarks/reward_memory.py

It needs no weights and no network; it takes about a minute. The numbers are those that `--dry_run` prints as
"decoding and scoring", estimated on the meta device. docs/rewards.md holds them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderTiny
from transformers import CLIPModel

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from parts_configs import write_configs

from rdm_diffusers.config import RunConfig
from rdm_diffusers.families import FAMILIES, pipeline_config
from rdm_diffusers.rewards.clip import vit_h_config
from rdm_diffusers.rewards.clip_rewards import HpsV2
from rdm_diffusers.rewards.preprocessing import Preprocessing
from rdm_diffusers.tiny.captions import make_tokenizer
from rdm_diffusers.training.memory_model import meta_models, meta_pipeline
from rdm_diffusers.training.reward_memory import measure_rewards

TEACHER, LATENTS = "stabilityai/stable-diffusion-xl-base-1.0", (4, 128, 128)
SETTINGS = [
    {},
    {"decode_batch_size": 1},
    {"decode_batch_size": 1, "gradient_checkpointing": True},
    {"decode_batch_size": 1, "reward_vae": "taesdxl"},  # of diffusers' default sizes, which are its own
]


def main() -> None:
    with torch.device("meta"):
        model = CLIPModel(vit_h_config()).requires_grad_(False)
    reward = HpsV2("hpsv2.1", model.eval(), make_tokenizer(), Preprocessing(224, fit="pad", clamps=False))
    with TemporaryDirectory() as folder:
        teacher = write_configs(TEACHER, Path(folder) / "teacher")
        AutoencoderTiny().save_pretrained(Path(folder) / "taesdxl")
        index = pipeline_config(str(teacher))
        family = FAMILIES[index["_class_name"]]
        for setting in SETTINGS:
            flags = {n: str(Path(folder) / v) if n == "reward_vae" else v for n, v in setting.items()}
            config = RunConfig.of(
                pretrained_model=str(teacher), mixed_precision="bf16", algorithm="gndmr", reward=["hpsv2"], **flags
            )
            networks = meta_models(str(teacher), {"vae": index["vae"]}, None)
            torch.nn.Module.to(networks["vae"], torch.bfloat16)
            found = measure_rewards(config, [reward], family, meta_pipeline(family, networks), LATENTS)
            print(f"{found.pictures} pictures, {setting}: {found.peak / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
