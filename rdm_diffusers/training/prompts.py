"""Prompts: where they come from, their embeddings (encoded once, cached on disk), and which group gets which."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Array2D, Dataset, Features, Sequence as Row, Value
from torch import Tensor

from ..distillation import Draws
from ..families import Conditioning, Teacher
from ..tiny import is_tiny
from ..tiny.captions import CAPTIONS
from .placement import visiting


def load_prompts(args) -> list[str]:
    """The prompts that the arguments name; for the tiny teacher its own 240 captions by default.

    Raises:
        ValueError: if the file is missing or empty, the column is missing, or a real teacher has no prompts.
    """
    if args.prompts_file is not None:
        prompts = _read_lines(Path(args.prompts_file))
    elif args.dataset_name is not None:
        prompts = _read_column(args.dataset_name, args.dataset_config_name, args.caption_column)
    elif is_tiny(args.pretrained_model_name_or_path):
        prompts = list(CAPTIONS)
    else:
        raise ValueError("No prompts: give --prompts_file, or --dataset_name with --caption_column.")
    return prompts[: args.max_train_samples]


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"--prompts_file {path} does not exist; give a text file with one prompt a line.")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts_file {path} holds no prompts; write one a line.")
    return prompts


def _read_column(name: str, config: str | None, column: str) -> list[str]:
    dataset = datasets.load_dataset(name, config, split="train")
    if column not in dataset.column_names:
        raise ValueError(
            f"--caption_column {column} is not in {name}; its columns are {', '.join(dataset.column_names)}."
        )
    prompts = [text for text in dataset[column] if isinstance(text, str) and text.strip()]
    if not prompts:
        raise ValueError(f"The column {column} of {name} holds no prompts.")
    return prompts


def spread(prompts: Sequence[str], count: int) -> list[str]:
    """`count` prompts spread evenly over those given, repeated where there are fewer."""
    return [prompts[i * len(prompts) // count] for i in range(count)]


@dataclass(frozen=True)
class Texts:
    """All that a run reads, as the teacher's text encoders read it; they are not needed again.

    Args:
        prompts: the N prompts.
        embeddings: theirs, one row each, on the disk.
        nothing: what the teacher guides away from, of length 1.
        shown: the prompts of the pictures that are drawn on the way.
        shown_conditioning: theirs.
    """

    prompts: list[str]
    embeddings: Dataset
    nothing: Conditioning
    shown: list[str]
    shown_conditioning: Conditioning


def read_texts(teacher: Teacher, prompts: list[str], args, accelerator: Accelerator) -> Texts:
    """Has the text encoders visit the device to read everything; prompts that an earlier run read are found cached."""
    shown = spread(args.validation_prompt or prompts, args.num_validation_images)
    fingerprint = _fingerprint(teacher, prompts)
    with visiting(teacher.text_encoders, accelerator.device):
        with accelerator.local_main_process_first():
            embeddings = embed_prompts(teacher, prompts, args.cache_dir, fingerprint)
        nothing, shown_conditioning = teacher.encode_nothing(), teacher.encode_prompts(shown)
    return Texts(prompts, embeddings, nothing, shown, shown_conditioning)


@dataclass
class PromptGroups:
    """Which prompt each group trains on: every prompt once an epoch, in an order that only the seed decides.

    Args:
        prompts: the N prompts.
        embeddings: their embeddings, one row each.
        draws: the run's randomness.
        dtype: the dtype that the denoiser reads.
    """

    prompts: Sequence[str]
    embeddings: Dataset
    draws: Draws
    dtype: torch.dtype

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

    def conditioning(self, groups: Sequence[int]) -> Conditioning:
        """The embeddings of the groups' prompts, each G times: length `len(groups) * G`."""
        members = torch.arange(len(groups)).repeat_interleave(self.draws.group_size)
        return self.once([self.index(group) for group in groups])[members.to(self.draws.device)]

    def once(self, indices: Sequence[int]) -> Conditioning:
        """The embeddings of the chosen prompts, on the device."""
        rows = self.embeddings[list(indices)]
        conditioning = Conditioning({name: torch.stack(list(column)) for name, column in rows.items()})
        return conditioning.to(self.draws.device, self.dtype)


def embed_prompts(
    teacher: Teacher, prompts: Sequence[str], cache_dir: str | None, fingerprint: str, batch_size: int = 8
) -> Dataset:
    """Encodes the prompts with the teacher's text encoders, or reads what an earlier run cached.

    Args:
        teacher: the teacher.
        prompts: N prompts.
        cache_dir: where the cache lives; by default beside the datasets' own.
        fingerprint: the cache's key.
        batch_size: prompts encoded at once.

    Returns:
        A memory-mapped dataset of N rows with a column for each tensor of the family's conditioning.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "rdm_embeddings"
    folder.mkdir(parents=True, exist_ok=True)

    def encode(batch: dict[str, list[str]]) -> dict[str, np.ndarray]:
        conditioning = teacher.encode_prompts(batch["prompt"])
        return {name: _storable(tensor).cpu().numpy() for name, tensor in conditioning.tensors.items()}

    example = teacher.encode_prompts(prompts[:1])
    features = Features({name: _feature(_storable(tensor)[0]) for name, tensor in example.tensors.items()})
    datasets.disable_progress_bars()
    return (
        Dataset.from_dict({"prompt": list(prompts)})
        .map(
            encode,
            batched=True,
            batch_size=batch_size,
            remove_columns=["prompt"],
            features=features,
            new_fingerprint=fingerprint,
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
        )
        .with_format("torch")
    )


def _storable(tensor: Tensor) -> Tensor:
    """bfloat16, which the cache's format lacks, widened to float32."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _feature(row: Tensor):
    dtype = str(row.dtype).removeprefix("torch.")
    if row.ndim == 2:
        return Array2D(shape=tuple(row.shape), dtype=dtype)
    return Row(Value(dtype), length=len(row))


def _fingerprint(teacher: Teacher, prompts: Sequence[str]) -> str:
    """Of the prompts, how they are read, and the text encoders' weights, so that no cached embedding can be stale."""
    digest = hashlib.sha256(repr((list(prompts), teacher.options)).encode())
    for encoder in teacher.text_encoders:
        for parameter in encoder.parameters():
            digest.update(repr((str(parameter.dtype), parameter.double().sum().item())).encode())
    return digest.hexdigest()[:32]
