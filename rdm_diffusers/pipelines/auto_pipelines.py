"""diffusers' AutoPipelines, made to know the few-step pipelines."""

from __future__ import annotations

from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)


def register(pipeline_class: type[DiffusionPipeline], stock: type[DiffusionPipeline]) -> None:
    """Lets `from_pipe` of the AutoPipelines take a few-step pipeline, as they take its stock one.

    For text to image it stays a few-step pipeline; for the other tasks it becomes the stock one of its kind.
    """
    keys = [key for key, each in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items() if each is stock]
    for key in keys[:1]:
        AUTO_TEXT2IMAGE_PIPELINES_MAPPING[f"rdm-{key}"] = pipeline_class
        for mapping in (AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, AUTO_INPAINT_PIPELINES_MAPPING):
            if key in mapping:
                mapping[f"rdm-{key}"] = mapping[key]
