"""The tiny teacher's reference statistics and its own quality, made once and shipped with it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..frechet import GaussianStatistics, frechet_distance
from .captions import CAPTIONS, DRAWINGS
from .classifier import DrawingClassifier, load_classifier
from .handwriting import Handwriting

STATISTICS = "reference.safetensors"
QUALITY = "quality.json"
GUIDANCE_SCALE = 4.0
STEPS = 50
IMAGES = 5000


def load_statistics(folder: str | Path | None = None) -> dict[str, GaussianStatistics]:
    """Feature statistics of the `teacher`'s 50-step pictures and of the `data`."""
    tensors = load_file(Path(folder or Path(__file__).parent) / STATISTICS)
    return {
        name: GaussianStatistics(tensors[f"{name}.mean"], tensors[f"{name}.covariance"]) for name in ("teacher", "data")
    }


def load_quality(folder: str | Path | None = None) -> dict:
    """The teacher's own quality, as `make_teacher` measured it on pictures that are not in the reference."""
    return json.loads((Path(folder or Path(__file__).parent) / QUALITY).read_text())


@torch.no_grad()
def draw_with_teacher(pipeline: StableDiffusionPipeline, count: int, first_seed: int) -> Tensor:
    """`count` pictures of all captions in turn, 50 DDIM steps with guidance: `[count, 3, 32, 32]` in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, count, 250):
        numbers = range(start, min(start + 250, count))
        parts.append(
            pipeline(
                [CAPTIONS[i % len(CAPTIONS)] for i in numbers],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=[torch.Generator().manual_seed(first_seed + i) for i in numbers],
                output_type="pt",
            ).images
        )
    return torch.cat(parts)


@torch.no_grad()
def write_reference(folder: Path) -> None:
    """Measures the teacher in `folder` and writes its statistics and its quality beside it."""
    classifier = load_classifier(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "teacher", use_safetensors=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    handwriting = Handwriting(torch.Generator().manual_seed(0))
    data = handwriting.draw([DRAWINGS[i % len(DRAWINGS)] for i in range(24_000)])
    reference = draw_with_teacher(pipeline, IMAGES, first_seed=0)
    fresh = draw_with_teacher(pipeline, IMAGES, first_seed=IMAGES)
    images = {"teacher": reference, "data": data, "fresh": fresh}
    statistics = {name: GaussianStatistics.of(classifier.features(pictures)) for name, pictures in images.items()}
    tensors = {}
    for name in ("teacher", "data"):
        tensors[f"{name}.mean"], tensors[f"{name}.covariance"] = statistics[name].mean, statistics[name].covariance
    save_file(tensors, folder / STATISTICS)
    quality = {
        "sampler": f"{STEPS} DDIM steps",
        "guidance_scale": GUIDANCE_SCALE,
        "num_images": IMAGES,
        "fd_to_teacher": frechet_distance(statistics["fresh"], statistics["teacher"]),
        "fd_to_data": frechet_distance(statistics["fresh"], statistics["data"]),
        **accuracies(classifier, fresh),
    }
    (folder / QUALITY).write_text(json.dumps(quality, indent=2) + "\n")
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
