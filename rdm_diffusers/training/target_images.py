"""The images of the teacher that its target learns from: drawn once, and cached for later runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from ..config import RunConfig
from ..distillation import Draws, draw_samples
from ..families import Conditioning, Teacher
from ..networks import TEACHER
from ..sharding import gather
from .assembly import DTYPES, make_scheduler
from .cache_parts import whole_parts, write_part
from .prompts import PromptGroups
from .updates import Distillation

FOLDER = "rdm_target_images"
PART = 64  # images in a file
DAMAGED = "The teacher's images in {path} are damaged; they are drawn again."
SEED = 0  # of all runs, so that they share the images


@dataclass(frozen=True)
class TargetImages:
    """N images of the teacher and their prompts.

    Args:
        folder: the cache, whose name is a digest of all that decides the images.
        latents: `[N, C, H, W]`, on the CPU.
        prompts: which prompt each image has.
    """

    folder: Path
    latents: Tensor
    prompts: PromptGroups

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def draws(self) -> Draws:
        """Random numbers for single images, the same for runs of all seeds."""
        return self.prompts.draws

    def conditioning(self, indices: Tensor) -> Conditioning:
        """The embeddings of the chosen images' prompts, on the device."""
        return self.prompts.conditioning(indices.tolist())


def draw_target_images(
    run: Distillation, teacher: Teacher, config: RunConfig, accelerator: Accelerator
) -> TargetImages:
    """Draws the guided teacher's images, or reads those that an earlier run cached; an interrupted drawing goes on.

    Every process draws its share, in parts of `PART` images, and reads all of them.

    Raises:
        OSError: if a part cannot be written, or if the processes share no cache.
    """
    prompts = replace(run.prompts, draws=Draws(SEED, 1, run.draws.device))
    count, steps = config.target.num_target_images, config.target.target_inference_steps
    parent = Path(config.prompts.cache_dir or datasets.config.HF_DATASETS_CACHE) / FOLDER
    folder = parent / _digest(run, teacher, prompts, steps)
    parts = [range(start, start + PART) for start in range(0, count, PART)]  # whole ones, which any run can share
    sampler = make_scheduler(teacher, steps, eta=0.0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in _share(folder, parts, accelerator):
            latents = draw_samples(
                partial(run.networks.predict, TEACHER),
                sampler,
                [prompts.draws.normal("target_image", parts[number], run.latent_shape)],
                prompts.conditioning(parts[number]),
                micro_batch_size=run.micro_batch_size,
            )
            write_part(folder, number, {"latents": latents.to("cpu", DTYPES[config.memory.mixed_precision])})
        accelerator.wait_for_everyone()
        found = whole_parts(folder)
    except OSError as error:
        raise OSError(
            f"The teacher's images could not be cached in {folder} ({error}); free some space there, or name another "
            "folder with --cache_dir."
        ) from error
    if len(found) < len(parts):
        raise OSError(f"Images of the teacher are missing in {folder}; name a --cache_dir that all processes share.")
    latents = torch.cat([load_file(found[number])["latents"] for number in range(len(parts))])
    return TargetImages(folder, latents[:count], prompts)


def _digest(run: Distillation, teacher: Teacher, prompts: PromptGroups, steps: int) -> str:
    """Of all that decides an image: the teacher's weights, its prompts and how they are read, and the sampler."""
    networks, ends = run.networks, prompts.once([0, len(prompts.prompts) - 1])
    digest = hashlib.sha256(repr((list(prompts.prompts), networks.guidance_scale, steps, run.latent_shape)).encode())
    digest.update(repr((teacher.options, dict(teacher.pipeline.scheduler.config), prompts.dtype)).encode())
    weights = (p for name, p in teacher.denoiser.named_parameters() if "lora_" not in name)
    for tensor in (*weights, *ends.tensors.values(), *networks.null_conditioning.tensors.values()):
        digest.update(repr((tuple(tensor.shape), gather(tensor.detach().double().sum()).item())).encode())
    return digest.hexdigest()[:32]


def _share(folder: Path, parts: list[range], accelerator: Accelerator) -> Iterator[int]:
    """The parts that this process is to draw; the same number on each, because shards of weights need all of them."""
    found = whole_parts(folder, DAMAGED)
    missing = [number for number in range(len(parts)) if number not in found]
    (missing,) = broadcast_object_list([missing])
    size, index = accelerator.num_processes, accelerator.process_index
    total = len(parts) * PART
    done = total - len(missing) * PART
    with tqdm(total=total, initial=done, desc="teacher's images", disable=not accelerator.is_main_process) as bar:
        for start in range(0, len(missing), size):
            turn = missing[start : start + size]
            yield turn[min(index, len(turn) - 1)]
            bar.update(len(turn) * PART)
