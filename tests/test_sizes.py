"""Sizes of pictures: named, refused, and drawn by every family as its stock pipeline draws them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parts import PROMPTS, relative_error
from parts_families import CALLS, MAKERS, make_pipeline, own_latents, stock_latents
from parts_sd3 import make_shared
from torch import Tensor

from rdm_diffusers.config import RunConfig
from rdm_diffusers.families import FAMILIES, PromptOptions, Teacher, on_white
from rdm_diffusers.networks import TEACHER, SeparateNetworks
from rdm_diffusers.sizes import RESOLUTION, height_and_width, in_words, nearest, resolution_of

WIDE = {"SanaPipeline": "96x32", "QwenImage21Pipeline": "64x32"}  # the others' stock pipelines take these, too
every = pytest.mark.parametrize("name", MAKERS)


def wide(name: str) -> str:
    return WIDE.get(name, "48x32")


def call_of(name: str, size: str) -> dict[str, Any]:
    """What the stock pipeline is called with for pictures of this size."""
    height, width = height_and_width(size)
    return {**CALLS.get(name, {}), "height": height, "width": width}


def make_teacher(name: str, size: str) -> Teacher:
    options = PromptOptions(CALLS.get(name, {}).get("max_sequence_length"), size, 3.5)
    return Teacher(make_pipeline(name), FAMILIES[name], name, options)


def test_a_size_has_one_name() -> None:
    assert [RESOLUTION.parse(text) for text in ("1024", "1024x1024", "1216x832", "1216X832")] == [
        1024, 1024, "1216x832", "1216x832",
    ]  # fmt: skip
    assert height_and_width("1216x832") == (832, 1216) and height_and_width(512) == (512, 512)
    assert resolution_of(832, 1216) == "1216x832" and in_words("1216x832") == "1216 x 832" and in_words(64) == "64 x 64"
    assert nearest("1210x830", 16) == "1216x832" and nearest(3, 16) == 16 and nearest("3000x100", 16, 1536) == "1536x96"


@pytest.mark.parametrize("value", ["", "big", "12x", "1x2x3", "-5", "1.5", "1,2"])
def test_what_is_no_size_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"^--resolution is .*; it must be pixels per side, 1024 for example, or"):
        RunConfig.of(resolution=value)


@pytest.mark.parametrize("value", [0, 80_000, "64x0", "64x16385"])
def test_sides_have_bounds(value: int | str) -> None:
    with pytest.raises(ValueError, match=f"^--resolution is {value}; each side must be at least 1 and at most"):
        RunConfig.of(resolution=value)


@every
def test_a_size_that_a_teacher_cannot_draw_is_refused_with_the_nearest(name: str) -> None:
    pipeline, family = make_pipeline(name), FAMILIES[name]
    with pytest.raises(ValueError, match=r"draws no pictures of 50 x 33 pixels, because") as refused:
        family.latent_shape(pipeline, "50x33")
    size = str(refused.value).split("the nearest size is ")[1].rstrip(".")
    assert family.latent_shape(pipeline, size) and size in ("48x32", "64x32")


@pytest.mark.parametrize(("name", "most"), [("StableDiffusion3Pipeline", 64), ("ZImagePipeline", 256)])
def test_a_teacher_with_a_table_of_positions_draws_nothing_beyond_it(name: str, most: int) -> None:
    pipeline, family = make_pipeline(name), FAMILIES[name]
    assert family.latent_shape(pipeline, f"{most}x32")[2] == most // pipeline.vae_scale_factor
    with pytest.raises(ValueError, match=f"knows no places beyond {most}; the nearest size is {most}x32"):
        family.latent_shape(pipeline, f"{most + 8}x32")


@every
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_teacher_is_what_the_stock_pipeline_computes_where_width_and_height_differ(
    name: str, guidance_scale: float
) -> None:
    teacher, size = make_teacher(name, wide(name)), wide(name)
    shape = teacher.family.latent_shape(teacher.pipeline, size)
    assert shape[2] > shape[1]
    latents = torch.randn(2, *shape)
    stock, size_of_call = make_pipeline(name), 1 if teacher.family.mixes_prompts else 2
    stock.scheduler = teacher.family.stock_scheduler(stock.scheduler, 1, eta=0)
    embeds = teacher.family.embeds_guidance(stock)
    guided = {"guidance_scale": 3.5} if embeds else teacher.family.guided(guidance_scale)
    if "negative_prompt" in guided:
        guided["negative_prompt"] = [guided["negative_prompt"]] * size_of_call
    call = {**call_of(name, size), **guided, "num_inference_steps": 1}
    parts = [slice(i, i + size_of_call) for i in range(0, 2, size_of_call)]

    def drawn(kind: str) -> Tensor:
        given = {"output_type": kind, **call}
        calls = [{"prompt": list(PROMPTS[p]), "latents": stock_latents(name, latents[p]), **given} for p in parts]
        return torch.cat([stock(**each).images for each in calls])

    with torch.no_grad():
        expected, pictures = own_latents(stock, drawn("latent"), latents), on_white(drawn("pt"))
    networks: Any = make_shared(teacher, 1.0 if embeds else guidance_scale) if teacher.family.has_lora else None
    if networks is None:
        networks = SeparateNetworks(
            dict.fromkeys(("student", "fake_score", "teacher"), teacher.denoiser), family=teacher.family,
            schedule=teacher.schedule, prediction_type=teacher.prediction_type,
            null_conditioning=teacher.encode_nothing(), guidance_scale=guidance_scale,
        )  # fmt: skip
    first = torch.full((2,), 1000.0 if teacher.schedule.is_flow else 999)
    with torch.no_grad():
        x0 = networks.predict(TEACHER, latents, first, teacher.encode_prompts(PROMPTS[:2]))
        decoded = teacher.family.decode(teacher.pipeline, x0)
    assert relative_error(x0, expected) < 1e-5
    assert decoded.shape[-2:] == pictures.shape[-2:] == height_and_width(size)
    assert (decoded - pictures).abs().max() < 1e-4
