"""The teacher's images that a target learns from, as picture files: what an evaluation takes as its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.pictures import save_image
from ..families import Teacher
from ..folders import ASIDE, write_whole
from ..hardware import to_float64
from .devices import on_device

ORIGIN, PROMPTS = "origin.txt", "prompts.txt"


@dataclass(frozen=True)
class PictureFolder:
    """The folder of `--target_images_dir`: `000000.png` and so on, and `prompts.txt`, whose line i is picture i's.

    Args:
        path: of the folder; it may be missing.
        origin: a digest of all that decides the pictures.
    """

    path: Path
    origin: str

    @classmethod
    def of(cls, path: str, images: str, vae: ModelMixin) -> PictureFolder:
        """For images with this digest, which this autoencoder decodes."""
        return cls(Path(path), f"{images} {sum(to_float64(p).sum().item() for p in vae.parameters())}\n")

    def check(self, count: int) -> None:
        """ValueError if there are files in the folder that are not among `count` pictures of this origin."""
        files = {file.name for file in self.path.glob("*") if not file.name.startswith(ASIDE)}
        if not files:
            return
        is_own = ORIGIN in files and (self.path / ORIGIN).read_text() == self.origin
        if not is_own or sum(name.endswith(".png") for name in files) > count:
            raise ValueError(
                f"--target_images_dir {self.path} holds other files, images that were drawn otherwise, or more images; "
                "name another folder, or empty it."
            )

    @torch.no_grad()
    def write(self, latents: Tensor, prompts: Sequence[str], teacher: Teacher, accelerator: Accelerator) -> None:
        """Decodes the pictures that the folder lacks. Every process must call, and writes its share.

        Args:
            latents: `[N, C, H, W]`.
            prompts: of each.
            teacher: whose autoencoder decodes them.
            accelerator: of the run.
        """
        if accelerator.is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / ORIGIN, self.origin)
            write_whole(self.path / PROMPTS, "".join(" ".join(prompt.split()) + "\n" for prompt in prompts))
        accelerator.wait_for_everyone()
        own = range(accelerator.process_index, len(latents), accelerator.num_processes)
        missing = [i for i in own if not self._file(i).exists()]
        aside = self.path / f"{ASIDE}{accelerator.process_index}.png"
        with on_device([teacher.pipeline.vae], accelerator.device):
            for i in tqdm(missing, desc="pictures", unit="image", disable=not accelerator.is_main_process):
                latent = latents[i : i + 1].to(accelerator.device, torch.float32)
                save_image(teacher.family.decode(teacher.pipeline, latent)[0], self._file(i), aside)
        accelerator.wait_for_everyone()

    def _file(self, number: int) -> Path:
        return self.path / f"{number:06}.png"
