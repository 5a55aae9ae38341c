"""The differentiable preprocessing is the official one, but for the rounding to 8 bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parts_rewards import qwen_config
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, Qwen2VLImageProcessor, Qwen2VLModel

from rdm_diffusers.rewards.hpsv3 import PIXELS, HpsV3, preference_head
from rdm_diffusers.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing

PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # 640 x 427 pixels


def photograph(name: str, crop: tuple[int, int] | None = None) -> np.ndarray:
    """A photograph `[H, W, 3]` of scikit-learn's, 8 bits; the upper left corner of this height and width."""
    datasets = pytest.importorskip("sklearn.datasets")
    picture = datasets.load_sample_image(name)
    return picture if crop is None else picture[: crop[0], : crop[1]]


def as_tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255


def normalise(picture: Image.Image) -> Tensor:
    pixels = as_tensor(np.asarray(picture))
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def torchvision_crop(picture: np.ndarray) -> Tensor:
    """Resize(224, bicubic), CenterCrop(224), ToTensor, Normalize, with the arithmetic of torchvision on Pillow."""
    image = Image.fromarray(picture)
    short = min(image.size)
    image = image.resize(tuple(224 if side == short else int(224 * side / short) for side in image.size), Image.BICUBIC)
    left, top = (round((side - 224) / 2) for side in image.size)
    return normalise(image.crop((left, top, left + 224, top + 224)))


def transformers_crop(picture: np.ndarray) -> Tensor:
    """CLIPImageProcessor with its defaults: shortest edge 224, bicubic, centre crop."""
    return torch.as_tensor(np.asarray(CLIPImageProcessor()(Image.fromarray(picture)).pixel_values))


def padded(picture: np.ndarray) -> Tensor:
    """ResizeMaxSize(224) of HPSv2 by Pillow: longer side 224, black around."""
    image = Image.fromarray(picture)
    scale = 224 / max(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)
    square = Image.new("RGB", (224, 224))
    square.paste(image, tuple((224 - side) // 2 for side in image.size))
    return normalise(square)


OFFICIAL = {
    "torchvision": (torchvision_crop, Preprocessing(rounds_up=True)),
    "transformers": (transformers_crop, Preprocessing()),
    "hpsv2": (padded, Preprocessing(fit="pad", clamps=False)),
}


@pytest.mark.parametrize("crop", [None, (427, 427), (300, 201), (96, 96)], ids=["wide", "square", "tall", "enlarged"])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize(("official", "ours"), OFFICIAL.values(), ids=OFFICIAL)
def test_photographs_are_the_official_ones_within_the_rounding_to_8_bits(
    official: Callable[[np.ndarray], Tensor], ours: Preprocessing, name: str, crop: tuple[int, int] | None
) -> None:
    picture = photograph(name, crop)
    difference = (ours(as_tensor(picture)) - official(picture)) * torch.tensor(CLIP_STD)[:, None, None]
    assert difference.abs().mean() < 0.5 / 255  # 2 / 255 is asked for
    assert difference.abs().max() < (4 if ours.clamps else 24) / 255  # without clamping, overshoot is kept


def test_the_half_pixel_of_the_centre_matters() -> None:
    picture = photograph("china.jpg")
    difference = (Preprocessing()(as_tensor(picture)) - torchvision_crop(picture)).abs().mean()
    assert difference > 0.05  # one pixel aside: the two official centres are not the same


@pytest.mark.parametrize("crop", [None, (427, 427), (300, 201), (96, 96)], ids=["wide", "square", "tall", "enlarged"])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_patches_for_hpsv3_are_those_of_qwen_s_processor(name: str, crop: tuple[int, int] | None) -> None:
    picture = photograph(name, crop)
    judge = HpsV3(Qwen2VLModel(qwen_config()), preference_head(16), None, "{text_prompt}")  # type: ignore[arg-type]
    official = Qwen2VLImageProcessor(min_pixels=PIXELS, max_pixels=PIXELS)(
        Image.fromarray(picture), return_tensors="pt"
    )
    patches, grid = judge.patches(as_tensor(picture))
    assert grid == tuple(official.image_grid_thw[0].tolist())
    assert (patches - official.pixel_values).abs().mean() * min(CLIP_STD) < 0.5 / 255


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (13, 7), (7, 13), (5, 5), (40, 9)])
def test_every_picture_becomes_a_square_of_the_asked_size(fit, height: int, width: int) -> None:
    assert Preprocessing(8, fit)(torch.rand(2, 3, height, width)).shape == (2, 3, 8, 8)


def test_a_picture_of_the_right_size_is_only_normalised() -> None:
    images = torch.rand(2, 3, 8, 8)
    expected = (images - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    for fit in ("crop", "pad"):
        torch.testing.assert_close(Preprocessing(8, fit)(images), expected)


def test_clamping_keeps_the_overshoot_out() -> None:
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    free, clamped = (Preprocessing(32, clamps=clamps)(edge) * std + mean for clamps in (False, True))
    assert free.min() < -0.01
    assert free.max() > 1.01
    torch.testing.assert_close(clamped, free.clamp(0, 1))


def test_half_precision_pictures_are_resized_in_float32() -> None:
    images = torch.rand(1, 3, 20, 20)
    assert Preprocessing(8)(images.bfloat16()).dtype == torch.float32
    assert Preprocessing(8)(images.double()).dtype == torch.float64


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize(("height", "width"), [(11, 14), (5, 4)])
def test_gradients_are_those_of_finite_differences(fit, height: int, width: int) -> None:
    images = (0.25 + 0.5 * torch.rand(1, 3, height, width, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(Preprocessing(8, fit), images)


def test_all_pixels_that_are_seen_have_a_gradient() -> None:
    images = torch.full((1, 3, 40, 30), 0.5, requires_grad=True)
    Preprocessing(8, "pad")(images).sum().backward()
    assert (images.grad != 0).all()
    assert F.avg_pool2d(images.grad, 3).isfinite().all()
