"""Prompts: where they come from, and which group gets which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator

from ..config import PromptsConfig, RunConfig
from ..config.subjects import ON_THE_FLY
from ..distillation import Draws
from ..distillation.draws import sent
from ..families import Conditioning, Teacher
from ..prompts import DATA_FILES, read_captions, read_prompts
from ..tiny import is_tiny
from ..tiny.domains import domain_of
from .devices import on_device
from .embeddings import Embeddings, EncodedOnTheFly, embed_prompts, fingerprint_of

OF_DATASETS = {  # and their defaults
    "dataset_config_name": None, "dataset_split": "train", "caption_column": "text", "image_column": None,
}  # fmt: skip


def load_prompts(source: PromptsConfig, teacher: str, captions: Sequence[str] = ()) -> list[str]:
    """The prompts that the configuration names; for the tiny teachers their own captions by default.

    Of a dataset whose rows have several captions, all are prompts, row after row.

    Args:
        source: the configuration.
        teacher: its name.
        captions: of the user's images, which are the prompts if no file has others.

    Raises:
        ValueError: one sentence, if they cannot be read, if a flag has no effect, or if a real teacher has no prompts.
    """
    check_source(source)
    if source.prompts_file is not None:
        prompts = read_prompts(Path(source.prompts_file), "--prompts_file")
    elif captions:
        return list(captions)
    elif source.dataset_name is not None:
        place = (source.dataset_name, source.caption_column, source.dataset_split, source.dataset_config_name)
        prompts = list(chain.from_iterable(read_captions(*place, most=source.max_train_samples)))
    elif is_tiny(teacher):
        prompts = list(domain_of(teacher).captions)
    else:
        raise ValueError("No prompts: give --prompts_file, or --dataset_name with --caption_column.")
    return prompts[: source.max_train_samples]


def check_source(source: PromptsConfig) -> None:
    """Refuses flags that would have no effect, and files that belong to another flag."""
    if source.prompts_file is not None and source.dataset_name is not None and source.image_column is None:
        raise ValueError("--prompts_file and --dataset_name both name the prompts; leave one of them out.")
    if source.train_data_dir is not None and source.dataset_name is not None:
        raise ValueError("--train_data_dir and --dataset_name both name the data; leave one of them out.")
    idle = [f"--{name}" for name, usual in OF_DATASETS.items() if getattr(source, name) != usual]
    if source.train_data_dir is not None and "--caption_column" in idle:
        idle.remove("--caption_column")
    if idle and source.dataset_name is None:
        raise ValueError(f"{', '.join(idle)} would have no effect without --dataset_name; leave out, or add that.")
    if source.prompts_file is not None and Path(source.prompts_file).suffix.lower() in DATA_FILES:
        raise ValueError(
            f"--prompts_file {source.prompts_file} is a table, not a text file with one prompt a line; give it with "
            "--dataset_name and --caption_column."
        )


@dataclass(frozen=True)
class Texts:
    """All that a run reads, as the teacher's text encoders read it."""

    prompts: list[str]
    embeddings: Embeddings  # of the prompts, and then of other captions, from the disk or encoded on the fly
    nothing: Conditioning  # what the teacher guides away from, of length 1
    shown: list[str]  # the prompts of the pictures that are drawn on the way
    shown_conditioning: Conditioning
    captions: tuple[str, ...] = ()  # the other captions


def read_texts(
    teacher: Teacher, prompts: list[str], config: RunConfig, accelerator: Accelerator, captions: Sequence[str] = ()
) -> Texts:
    """Moves the text encoders to the device to read everything; what an earlier run read is cached.

    With `--encode_prompts on_the_fly` they read the prompts later, and are needed as long as the run lasts. The
    embeddings of `captions`, of images that have others than the prompts, follow those of the prompts.
    """
    choice, count = config.output.validation_prompt or prompts, config.output.num_validation_images
    shown = [choice[i * len(choice) // count] for i in range(count)]  # spread evenly, repeated where there are fewer
    source, device = config.prompts, accelerator.device
    embeddings: Embeddings
    texts = [*prompts, *captions]
    if source.encode_prompts == ON_THE_FLY:
        embeddings = EncodedOnTheFly(teacher, texts, source.encode_batch_size, device, config.memory.offload)
    else:
        fingerprint = fingerprint_of(teacher, texts)
        with on_device(teacher.text_encoders, device):  # processes wait for the cache's lock, for as long as it takes
            embeddings = embed_prompts(teacher, texts, source.cache_dir, fingerprint, source.encode_batch_size)
    with on_device(teacher.text_encoders, device):
        nothing, shown_conditioning = teacher.encode_nothing(), teacher.encode_prompts(shown)
    return Texts(prompts, embeddings, nothing, shown, shown_conditioning, tuple(captions))


@dataclass
class PromptGroups:
    """Which prompt each group trains on: every prompt once an epoch, in an order that only the seed decides."""

    prompts: Sequence[str]
    embeddings: Embeddings  # of the prompts, and then of other captions
    draws: Draws
    dtype: torch.dtype  # that the denoiser reads
    at_size: Callable[[Conditioning], Conditioning] | None = None  # names another size of pictures than they do
    captions: Sequence[str] = ()  # the other captions

    def __post_init__(self) -> None:
        self._order = lru_cache(maxsize=2)(
            lambda epoch: torch.randperm(len(self.prompts), generator=self.draws.generator("prompts", epoch))
        )

    def index(self, group: int) -> int:
        """The prompt of a group, as an index into `prompts`."""
        return int(self._order(group // len(self.prompts))[group % len(self.prompts)])

    def prompt(self, group: int) -> str:
        """The prompt of a group."""
        return self.prompts[self.index(group)]

    def text(self, index: int) -> str:
        """A prompt, or a caption behind them."""
        return self.prompts[index] if index < len(self.prompts) else self.captions[index - len(self.prompts)]

    def conditioning(self, groups: Sequence[int]) -> Conditioning:
        """The embeddings of the groups' prompts, each G times: length `len(groups) * G`."""
        members = torch.arange(len(groups)).repeat_interleave(self.draws.group_size)
        return self.once([self.index(group) for group in groups])[sent(members, self.draws.device)]

    def once(self, indices: Sequence[int]) -> Conditioning:
        """The embeddings of the chosen prompts, or of the captions behind them, on the device."""
        device, found = self.draws.device, self.embeddings(indices)
        sized = found if self.at_size is None else self.at_size(found)
        return Conditioning({name: sent(each, device) for name, each in sized.tensors.items()}).to(device, self.dtype)
