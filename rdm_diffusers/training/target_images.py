"""The images that the target learns from; those of the teacher are drawn once, and cached for later runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config import RunConfig
from ..distillation import Draws, draw_samples
from ..families import Conditioning, Teacher
from ..hardware import to_float64
from ..networks import TEACHER
from ..sharding import gather
from .assembly import DTYPES, teacher_scheduler
from .prompts import PromptGroups
from .run import Distillation
from .shared_parts import shared_parts
from .target_pictures import PictureFolder

FOLDER = "rdm_target_images"
PART = 64  # images in a file
SEED = 0  # of all runs, so that they share the images
HELD_OUT = 20  # every so many-th image is held out
MOST_HELD_OUT = 512
MOST_ALIKE = 128  # images of one prompt


@dataclass(frozen=True)
class TargetImages:
    """N images of one size and their prompts, from one source or two.

    Args:
        folder: the cache, whose name is a digest of all that decides the images.
        latents: `[N, C, H, W]`, on the CPU.
        prompts: all prompts, with the embeddings of other captions behind them.
        prompt_of: the number of each image's prompt among them `[N]`.
        sources: the share that each source has in the training, and the numbers of its images `[M, V]`, of which each
            has V versions, mirrored or not.
        share: of the training, that images of this size have.
    """

    folder: Path
    latents: Tensor
    prompts: PromptGroups
    prompt_of: Tensor
    sources: tuple[tuple[float, Tensor], ...]
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def draws(self) -> Draws:
        """Random numbers for single images, the same for runs of all seeds."""
        return self.prompts.draws

    def conditioning(self, indices: Tensor) -> Conditioning:
        """The embeddings of the chosen images' prompts, on the device."""
        return self.prompts.once(self.prompt_of[indices].tolist())

    @property
    def held_out(self) -> list[tuple[float, Tensor]]:
        """Of each source its share and the images that are held out, in all versions; `MOST_HELD_OUT` at most."""
        found = [(share, numbers[HELD_OUT - 1 :: HELD_OUT]) for share, numbers in self.sources]
        return [(share, numbers.flatten()[:MOST_HELD_OUT]) for share, numbers in found]

    @cached_property
    def training(self) -> list[Tensor]:
        """Of each source the images that are not held out, in all versions."""
        kept = [(numbers, torch.arange(len(numbers)) % HELD_OUT != HELD_OUT - 1) for _, numbers in self.sources]
        return [numbers[each].flatten() for numbers, each in kept]

    def chosen(self, uniform: Tensor) -> Tensor:
        """Images that are not held out `[B]`, from uniform numbers in [0, 1): a source by its share, one of its images.

        Args:
            uniform: `[B]`, on the CPU.
        """
        found, first = torch.zeros(len(uniform), dtype=torch.long), 0.0
        for (share, _), training in zip(self.sources, self.training, strict=True):
            places = ((uniform - first) / share * len(training)).long().clamp(0, len(training) - 1)
            found = torch.where(uniform >= first, training[places], found)
            first += share
        return found

    @cached_property
    def _alike(self) -> dict[int, Tensor]:
        """For each image that is learnt from: those of the same source and prompt, in parts of `MOST_ALIKE`."""
        found: dict[int, Tensor] = {}
        for training in self.training:
            of_prompt: dict[int, list[int]] = {}
            for number, prompt in zip(training.tolist(), self.prompt_of[training].tolist(), strict=True):
                of_prompt.setdefault(prompt, []).append(number)
            for part in chain.from_iterable(torch.tensor(each).split(MOST_ALIKE) for each in of_prompt.values()):
                found.update(dict.fromkeys(part.tolist(), part))
        return found

    def alike(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images that were as likely as those that were chosen: `[B, M]`, and which of them there are `[B, M]`."""
        found = [self._alike[number] for number in indices.tolist()]
        present = [torch.ones(len(each), dtype=torch.bool) for each in found]
        return pad_sequence(found, batch_first=True), pad_sequence(present, batch_first=True)


def draw_target_images(
    run: Distillation, teacher: Teacher, config: RunConfig, accelerator: Accelerator, numbers: range | None = None
) -> TargetImages:
    """Draws the guided teacher's images, or reads those that an earlier run cached; an interrupted drawing goes on.

    Every process draws its share, in parts of `PART` images, and reads all of them.

    With `--target_images_dir` they are written as picture files, too. `numbers` are those of the images, by which their
    prompts and noises are drawn; by default `--num_target_images` from 0.

    Raises:
        OSError: if a part cannot be written, or if the processes share no cache.
        ValueError: if `--target_images_dir` holds other images.
    """
    prompts = replace(run.prompts, draws=Draws(SEED, 1, run.draws.device))
    numbers = range(config.target.num_target_images) if numbers is None else numbers
    dtype = DTYPES[config.memory.mixed_precision]
    sampler = teacher_scheduler(teacher, config, config.target.target_inference_steps)
    parent = Path(config.prompts.cache_dir or datasets.config.HF_DATASETS_CACHE) / FOLDER
    folder = parent / _digest(run, teacher, prompts, sampler.timesteps, numbers)
    asked = config.output.target_images_dir
    pictures = asked and PictureFolder.of(asked, folder.name, teacher.pipeline.vae)
    if pictures:
        pictures.check(len(numbers))

    def draw(numbers: range) -> dict[str, Tensor]:
        latents = draw_samples(
            partial(run.networks.predict, TEACHER),
            sampler,
            [prompts.draws.normal("target_image", numbers, run.latent_shape)],
            prompts.conditioning(numbers),
            micro_batch_size=run.micro_batch_size,
        )
        return {"latents": latents.to("cpu", dtype)}

    first, step = numbers.start, numbers.step
    starts = (first + step * place for place in range(0, len(numbers), PART))
    parts = [range(start, start + step * PART, step) for start in starts]  # whole ones, which any run can share
    drawn = [part["latents"] for part in shared_parts(folder, parts, draw, accelerator, "the teacher's images")]
    latents = torch.cat([torch.empty(0, *run.latent_shape, dtype=dtype), *drawn])[: len(numbers)]
    prompt_of = torch.tensor([prompts.index(number) for number in numbers], dtype=torch.long)
    if pictures:
        pictures.write(latents, [prompts.prompt(number) for number in numbers], teacher, accelerator)
    return TargetImages(folder, latents, prompts, prompt_of, ((1.0, torch.arange(len(numbers))[:, None]),))


def _digest(run: Distillation, teacher: Teacher, prompts: PromptGroups, times: Tensor, numbers: range) -> str:
    """Of all that decides an image: the teacher's weights, its prompts and how they are read, and the sampler."""
    networks, ends = run.networks, prompts.once([0, len(prompts.prompts) - 1])
    strided = (numbers.start, numbers.step) if numbers.step > 1 else ()
    settings = (list(prompts.prompts), networks.guidance_scale, times.tolist(), run.latent_shape, *strided)
    digest = hashlib.sha256(repr(settings).encode())
    digest.update(repr((teacher.options, dict(teacher.pipeline.scheduler.config), prompts.dtype)).encode())
    weights = (p for name, p in teacher.denoiser.named_parameters() if "lora_" not in name)
    for tensor in (*weights, *ends.tensors.values(), *networks.null_conditioning.tensors.values()):
        digest.update(repr((tuple(tensor.shape), gather(to_float64(tensor.detach()).sum()).item())).encode())
    return digest.hexdigest()[:32]
