"""The tiny teachers' reference statistics and their own quality, made once and shipped with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..frechet import GaussianStatistics, frechet_distance
from . import MAX_SEQUENCE_LENGTHS, TINY_FLOW_NAME, TINY_NAME, TINY_TEACHERS, TINY_V_NAME
from .captions import CAPTIONS, DRAWINGS
from .classifier import DrawingClassifier
from .handwriting import Handwriting

STEPS = 50
IMAGES = 5000
SETS = ("teacher", "teacher_unguided", "data")


@dataclass(frozen=True)
class Reference:
    """How one teacher's reference is made, and the names of the files that hold it.

    Args:
        solver: what its 50 steps are taken with.
        sampler: the same in words.
        guidance_scale: w in u + w (c - u).
        statistics, quality: file names.
        load_options: what `from_pretrained` wants to be told: the dtype, and components that are not there.
    """

    solver: type[SchedulerMixin]
    sampler: str
    guidance_scale: float
    statistics: str
    quality: str
    load_options: Mapping[str, Any]


REFERENCES = {
    TINY_NAME: Reference(DDIMScheduler, "50 DDIM steps", 4.0, "reference.safetensors", "quality.json", {}),
    TINY_V_NAME: Reference(
        DDIMScheduler, "50 DDIM steps", 4.0, "reference_v.safetensors", "quality_v.json", {"torch_dtype": torch.float32}
    ),
    TINY_FLOW_NAME: Reference(
        FlowMatchEulerDiscreteScheduler,
        "50 Euler steps",
        4.0,
        "reference_flow.safetensors",
        "quality_flow.json",
        {"text_encoder_3": None, "tokenizer_3": None},
    ),
}
GUIDANCE_SCALE = REFERENCES[TINY_NAME].guidance_scale


def load_statistics(name: str = TINY_NAME, folder: str | Path | None = None) -> dict[str, GaussianStatistics]:
    """Feature statistics of a teacher's 50-step pictures, of those without guidance, and of the training pictures.

    Args:
        name: the embedded teacher's.
        folder: where its files lie; by default those that are shipped.

    Returns:
        The statistics `teacher`, `teacher_unguided` and `data`.
    """
    tensors = load_file(Path(folder or Path(__file__).parent) / REFERENCES[name].statistics)
    return {each: GaussianStatistics(tensors[f"{each}.mean"], tensors[f"{each}.covariance"]) for each in SETS}


def load_quality(name: str = TINY_NAME, folder: str | Path | None = None) -> dict:
    """A teacher's own quality, measured on pictures that are not in its reference; arguments as `load_statistics`."""
    return json.loads((Path(folder or Path(__file__).parent) / REFERENCES[name].quality).read_text())


@torch.no_grad()
def draw_with_teacher(
    pipeline: DiffusionPipeline, count: int, first_seed: int, guidance_scale: float, **call_options: Any
) -> Tensor:
    """`count` pictures of all captions in turn, 50 steps: `[count, 3, 32, 32]` in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, count, 250):
        numbers = range(start, min(start + 250, count))
        parts.append(
            pipeline(
                [CAPTIONS[i % len(CAPTIONS)] for i in numbers],
                num_inference_steps=STEPS,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(first_seed + i) for i in numbers],
                output_type="pt",
                **call_options,
            ).images
        )
    return torch.cat(parts)


def reference_pictures(folder: Path, name: str) -> dict[str, Tensor]:
    """The pictures behind a reference, `[N, 3, 32, 32]` in [0, 1]: those of `SETS`, and `fresh` ones of the teacher."""
    reference = REFERENCES[name]
    pipeline = DiffusionPipeline.from_pretrained(
        folder / Path(TINY_TEACHERS[name]).name, use_safetensors=True, **reference.load_options
    )
    pipeline.scheduler = reference.solver.from_config(pipeline.scheduler.config)
    options = {"max_sequence_length": MAX_SEQUENCE_LENGTHS[name]} if name in MAX_SEQUENCE_LENGTHS else {}
    handwriting = Handwriting(torch.Generator().manual_seed(0))
    return {
        "data": handwriting.draw([DRAWINGS[i % len(DRAWINGS)] for i in range(24_000)]),
        "teacher": draw_with_teacher(pipeline, IMAGES, 0, reference.guidance_scale, **options),
        "fresh": draw_with_teacher(pipeline, IMAGES, IMAGES, reference.guidance_scale, **options),
        "teacher_unguided": draw_with_teacher(pipeline, IMAGES, 0, 1.0, **options),
    }


@torch.no_grad()
def write_reference(folder: Path, name: str, classifier: DrawingClassifier) -> None:
    """Measures the teacher in `folder` and writes its statistics and its quality beside it.

    Args:
        folder: holds the pipeline's folder.
        name: the embedded teacher that it is a rebuild of.
        classifier: the feature net.
    """
    reference, images = REFERENCES[name], reference_pictures(folder, name)
    statistics = {each: GaussianStatistics.of(classifier.features(pictures)) for each, pictures in images.items()}
    tensors = {}
    for each in SETS:
        tensors[f"{each}.mean"], tensors[f"{each}.covariance"] = statistics[each].mean, statistics[each].covariance
    save_file(tensors, folder / reference.statistics)
    quality = {
        "sampler": reference.sampler,
        "guidance_scale": reference.guidance_scale,
        "num_images": IMAGES,
        "fd_to_teacher": frechet_distance(statistics["fresh"], statistics["teacher"]),
        "fd_to_data": frechet_distance(statistics["fresh"], statistics["data"]),
        **accuracies(classifier, images["fresh"]),
    }
    (folder / reference.quality).write_text(json.dumps(quality, indent=2) + "\n")
    print(json.dumps(quality, indent=2))


def accuracies(classifier: DrawingClassifier, images: Tensor) -> dict:
    """Shares of pictures with the right digit, ink, background, both colours, and all; also on held-out drawings."""
    drawings = [DRAWINGS[i % len(DRAWINGS)] for i in range(len(images))]
    correct = classifier.correct(images, drawings)
    correct["both_colours"] = correct["ink"] & correct["background"]
    held_out = torch.tensor([drawing.held_out for drawing in drawings])
    return {
        "prompt_accuracy": correct["all"].float().mean().item(),
        "accuracy": {name: right.float().mean().item() for name, right in correct.items()},
        "accuracy_on_held_out": {name: right[held_out].float().mean().item() for name, right in correct.items()},
        "num_held_out_images": int(held_out.sum()),
    }
