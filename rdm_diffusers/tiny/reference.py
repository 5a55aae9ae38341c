"""The tiny teachers' reference statistics and quality, which are measured once and embedded with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..frechet import GaussianStatistics, frechet_distance
from . import MAX_SEQUENCE_LENGTHS, TINY_FLOW_NAME, TINY_NAME, TINY_SCENES_NAME, TINY_V_NAME
from .domains import Reader, domain_of

STEPS = 50
GUIDANCE_SCALE = 4.0  # w in u + w (c - u)
SETS = ("teacher", "teacher_unguided", "data")


@dataclass(frozen=True)
class Reference:
    """How one teacher's reference is made.

    Args:
        suffix: of the names of its files.
        solver: the scheduler of its 50 steps.
        sampler: the solver in words.
        guidance_scale: w in u + w (c - u).
        images: how many are in each set of the teacher's pictures.
        load_options: arguments of `from_pretrained`: the dtype, and components that are missing.
    """

    suffix: str = ""
    solver: type[SchedulerMixin] = DDIMScheduler
    sampler: str = "50 DDIM steps"
    guidance_scale: float = GUIDANCE_SCALE
    images: int = 5000
    load_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def teacher_folder(self) -> str:
        """The name of the folder of its pipeline."""
        return f"teacher{self.suffix}"

    @property
    def statistics_file(self) -> str:
        """The name of the file of its statistics."""
        return f"reference{self.suffix}.safetensors"

    @property
    def quality_file(self) -> str:
        """The name of the file of the teacher's quality."""
        return f"quality{self.suffix}.json"


SD3_OPTIONS = {"text_encoder_3": None, "tokenizer_3": None}
REFERENCES = {
    TINY_NAME: Reference(),
    TINY_V_NAME: Reference("_v", load_options={"torch_dtype": torch.float32}),
    TINY_FLOW_NAME: Reference(
        "_flow", FlowMatchEulerDiscreteScheduler, "50 Euler steps",
        load_options=SD3_OPTIONS,
    ),
    TINY_SCENES_NAME: Reference(
        "_scenes", FlowMatchEulerDiscreteScheduler, "50 Euler steps", images=2000,
        load_options={"torch_dtype": torch.float32, **SD3_OPTIONS},
    ),
}  # fmt: skip


def load_statistics(name: str = TINY_NAME) -> dict[str, GaussianStatistics]:
    """A teacher's feature statistics: `teacher` and `teacher_unguided` of its 50-step images, `data` of real ones."""
    tensors = load_file(Path(__file__).with_name(REFERENCES[name].statistics_file))
    return {each: GaussianStatistics(tensors[f"{each}.mean"], tensors[f"{each}.covariance"]) for each in SETS}


def load_quality(name: str = TINY_NAME) -> dict:
    """A teacher's quality, measured on images that are not in its reference."""
    return json.loads(Path(__file__).with_name(REFERENCES[name].quality_file).read_text())


@torch.no_grad()
def _draw(
    pipeline: DiffusionPipeline, captions: Sequence[str], count: int, first_seed: int, guidance_scale: float,
    **options: Any,
) -> Tensor:  # fmt: skip
    """`count` images of the captions in turn, in 50 steps: `[count, 3, S, S]` in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, count, 250):
        numbers = range(start, min(start + 250, count))
        parts.append(
            pipeline(
                [captions[i % len(captions)] for i in numbers],
                num_inference_steps=STEPS,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(first_seed + i) for i in numbers],
                output_type="pt",
                **options,
            ).images
        )
    return torch.cat(parts)


def _reference_images(folder: Path, name: str) -> dict[str, Tensor]:
    """The images of a reference, `[N, 3, S, S]` in [0, 1]: those of `SETS`, and `fresh` ones of the teacher."""
    reference = REFERENCES[name]
    pipeline = DiffusionPipeline.from_pretrained(
        folder / reference.teacher_folder, use_safetensors=True, **reference.load_options
    )
    pipeline.scheduler = reference.solver.from_config(pipeline.scheduler.config)
    options = {"max_sequence_length": MAX_SEQUENCE_LENGTHS[name]} if name in MAX_SEQUENCE_LENGTHS else {}
    domain, count, scale = domain_of(name), reference.images, reference.guidance_scale
    drawings = [domain.parse(caption) for caption in domain.captions]
    draw = partial(_draw, pipeline, domain.captions, count, **options)
    return {
        "data": domain.pen(torch.Generator().manual_seed(0)).draw([drawings[i % len(drawings)] for i in range(24_000)]),
        "teacher": draw(first_seed=0, guidance_scale=scale),
        "fresh": draw(first_seed=count, guidance_scale=scale),
        "teacher_unguided": draw(first_seed=0, guidance_scale=1.0),
    }


@torch.no_grad()
def write_reference(folder: Path, name: str, reader: Reader) -> None:
    """Measures the rebuilt teacher in `folder`, and writes its statistics and its quality beside it."""
    reference, images = REFERENCES[name], _reference_images(folder, name)
    features = {each: torch.cat([reader.features(part) for part in drawn.split(500)]) for each, drawn in images.items()}
    statistics = {each: GaussianStatistics.of(found) for each, found in features.items()}
    tensors = {}
    for each in SETS:
        tensors[f"{each}.mean"], tensors[f"{each}.covariance"] = statistics[each].mean, statistics[each].covariance
    save_file(tensors, folder / reference.statistics_file)
    quality = {
        "sampler": reference.sampler,
        "guidance_scale": reference.guidance_scale,
        "num_images": reference.images,
        "fd_to_teacher": frechet_distance(statistics["fresh"], statistics["teacher"]),
        "fd_to_data": frechet_distance(statistics["fresh"], statistics["data"]),
        **_accuracies(reader, images["fresh"], name),
    }
    (folder / reference.quality_file).write_text(json.dumps(quality, indent=2) + "\n")
    print(json.dumps(quality, indent=2))


def _accuracies(reader: Reader, images: Tensor, name: str) -> dict:
    """Shares of images with the right digit, ink, background, ..., both colours, and all; also on held-out drawings."""
    domain = domain_of(name)
    drawings = [domain.parse(domain.captions[i % len(domain.captions)]) for i in range(len(images))]
    batches = [reader.correct(images[i : i + 500], drawings[i : i + 500]) for i in range(0, len(images), 500)]
    correct = {part: torch.cat([batch[part] for batch in batches]) for part in batches[0]}
    correct["both_colours"] = correct["ink"] & correct["background"]
    held_out = torch.tensor([drawing.held_out for drawing in drawings])
    return {
        "prompt_accuracy": correct["all"].float().mean().item(),
        "accuracy": {name: right.float().mean().item() for name, right in correct.items()},
        "accuracy_on_held_out": {name: right[held_out].float().mean().item() for name, right in correct.items()},
        "num_held_out_images": int(held_out.sum()),
    }
