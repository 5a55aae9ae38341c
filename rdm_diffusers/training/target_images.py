"""The images that the target learns from; those of the teacher are drawn once, and cached for later runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..config import RunConfig
from ..distillation import Draws, draw_samples
from ..families import Conditioning, Teacher
from ..networks import TEACHER
from ..sharding import gather
from .assembly import DTYPES, teacher_scheduler
from .cache_parts import whole_parts, write_part
from .prompts import PromptGroups
from .updates import Distillation

FOLDER = "rdm_target_images"
PART = 64  # images in a file
DAMAGED = "The teacher's images in {path} are damaged; they are drawn again."
SEED = 0  # of all runs, so that they share the images
HELD_OUT = 20  # every so many-th image is held out
MOST_HELD_OUT = 512
MOST_ALIKE = 128  # images of one prompt


@dataclass(frozen=True)
class TargetImages:
    """N images and their prompts, from one source or two.

    Args:
        folder: the cache, whose name is a digest of all that decides the images.
        latents: `[N, C, H, W]`, on the CPU.
        prompts: all prompts, with the embeddings of other captions behind them.
        prompt_of: the number of each image's prompt among them `[N]`.
        sources: the share that each source has in the training, and the numbers of its images `[M, V]`, of which each
            has V versions, mirrored or not.
    """

    folder: Path
    latents: Tensor
    prompts: PromptGroups
    prompt_of: Tensor
    sources: tuple[tuple[float, Tensor], ...]

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
    sampler = teacher_scheduler(teacher, config, steps)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in share(folder, parts, accelerator, "teacher's images", DAMAGED):
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
    drawn = [load_file(found[number])["latents"] for number in range(len(parts))]
    numbers = torch.arange(count)
    prompt_of = torch.tensor([prompts.index(number) for number in range(count)], dtype=torch.long)
    empty = torch.empty(0, *run.latent_shape, dtype=DTYPES[config.memory.mixed_precision])
    whole = torch.cat([empty, *drawn])[:count]
    return TargetImages(folder, whole, prompts, prompt_of, ((1.0, numbers[:, None]),))


def _digest(run: Distillation, teacher: Teacher, prompts: PromptGroups, steps: int) -> str:
    """Of all that decides an image: the teacher's weights, its prompts and how they are read, and the sampler."""
    networks, ends = run.networks, prompts.once([0, len(prompts.prompts) - 1])
    digest = hashlib.sha256(repr((list(prompts.prompts), networks.guidance_scale, steps, run.latent_shape)).encode())
    digest.update(repr((teacher.options, dict(teacher.pipeline.scheduler.config), prompts.dtype)).encode())
    weights = (p for name, p in teacher.denoiser.named_parameters() if "lora_" not in name)
    for tensor in (*weights, *ends.tensors.values(), *networks.null_conditioning.tensors.values()):
        digest.update(repr((tuple(tensor.shape), gather(tensor.detach().double().sum()).item())).encode())
    return digest.hexdigest()[:32]


def share(folder: Path, parts: list[range], accelerator: Accelerator, what: str, damaged: str) -> Iterator[int]:
    """The parts that this process is to make; the same number on each, because shards of weights need all of them.

    Args:
        folder: the cache's, whose whole parts are not made again.
        parts: the numbers of the images in each.
        accelerator: of the run.
        what: the images' name beside the progress bar.
        damaged: the warning of a damaged part, whose path replaces `{path}`.
    """
    found = whole_parts(folder, damaged)
    missing = [number for number in range(len(parts)) if number not in found]
    (missing,) = broadcast_object_list([missing])
    size, index = accelerator.num_processes, accelerator.process_index
    total, left = sum(map(len, parts)), sum(len(parts[number]) for number in missing)
    disable = not accelerator.is_main_process or not parts
    with tqdm(total=total, initial=total - left, desc=what, disable=disable) as bar:
        for start in range(0, len(missing), size):
            turn = missing[start : start + size]
            yield turn[min(index, len(turn) - 1)]
            bar.update(sum(len(parts[number]) for number in turn))
