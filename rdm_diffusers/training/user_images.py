"""The user's own images as what the target learns: found, cropped, encoded once, and cached for later runs."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from ..config import PromptsConfig, RunConfig
from ..distillation import Draws
from ..families import Teacher
from ..hardware import to_float64
from ..prompts import FLAGS, captions_of, load_rows
from ..sizes import resolution_of
from .assembly import DTYPES
from .devices import on_device
from .prompts import check_source
from .run import Distillation
from .shared_parts import shared_parts
from .target_images import PART, SEED, TargetImages, draw_target_images

FOLDER = "rdm_user_images"
FEWEST = 20  # of which one is held out
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # and none that runs other programs, as EPS does
MOST_BYTES, MOST_PIXELS = 2**28, 2**26  # of one image
ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)  # the tag of EXIF, and those of its values that exchange the sides
PATIENCE = 5  # seconds of reading after which its progress is shown


@dataclass(frozen=True)
class UserImages:
    """N images, which are decoded when they are asked for, each with its captions.

    Args:
        rows: the images' files, or the bytes of them, in the column `column`.
        column: as above.
        numbers: the rows of the images.
        texts: the captions of each image.
        source: the flag that names the images, and its value, for error messages.
    """

    rows: Dataset
    column: str
    numbers: list[int]
    texts: list[list[str]]
    source: str

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def captions(self) -> list[str]:
        """All captions, image after image."""
        return list(chain.from_iterable(self.texts))

    @property
    def caption_of(self) -> Tensor:
        """The number of each image's caption among `captions` `[N]`; of several one, which images take in turn.

        Images with the same caption have the same number.
        """
        counts = torch.tensor([len(texts) for texts in self.texts])
        numbers = counts.cumsum(0) - counts + torch.arange(len(counts)) % counts
        first: dict[str, int] = {}
        return torch.tensor([first.setdefault(self.captions[number], number) for number in numbers.tolist()])

    @cached_property
    def digest(self) -> str:
        """A SHA-256 of all images and captions. Each image's kind and size are checked on the way.

        Raises:
            ValueError: naming the image that cannot be used.
        """
        digest = hashlib.sha256()
        for i in tqdm(range(len(self)), desc="read", unit="image", delay=PATIENCE):
            content = self._bytes(i)
            self._open(i, content).close()
            digest.update(repr((hashlib.sha256(content).digest(), self.texts[i])).encode())
        return digest.hexdigest()

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """The height and the width of each image in pixels, turned as its camera says. Raises as `image` does."""
        return [self._size(i) for i in tqdm(range(len(self)), desc="read", unit="image", delay=PATIENCE)]

    def _size(self, index: int) -> tuple[int, int]:
        with self._open(index, self._bytes(index)) as file:
            lies = file.getexif().get(ORIENTATION) in LYING
            return (file.width, file.height) if lies else (file.height, file.width)

    def image(self, index: int, size: tuple[int, int], place: tuple[float, float]) -> Tensor:
        """An image as `[3, height, width]` in [0, 1]: turned as its camera says, cropped to that shape, and resized.

        Args:
            index: of the image.
            size: its height and width in pixels.
            place: of the crop, from (0, 0), the left and the top, to (1, 1).

        Raises:
            ValueError: naming the image, if it cannot be decoded.
        """
        file = self._open(index, self._bytes(index))
        try:
            with file:
                turned = ImageOps.exif_transpose(file).convert("RGB")
                cropped = ImageOps.fit(turned, size[::-1], Image.Resampling.LANCZOS, centering=place)
        except Exception as error:  # Pillow raises dozens of kinds
            raise ValueError(f"{self._name(index)} is damaged ({error}); replace it, or take it out.") from error
        return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 255

    def _open(self, index: int, content: bytes) -> Image.Image:
        """The image in a file's `content`, not yet decoded; ValueError if it is none, or too large."""
        problem = f"is no image that can be read here; use {', '.join(FORMATS)}"
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height <= MOST_PIXELS:
                return image
            problem = f"has {image.width:,} x {image.height:,} pixels; make it smaller than {MOST_PIXELS:,} in all"
        except Image.DecompressionBombError:
            problem = f"has too many pixels; make it smaller than {MOST_PIXELS:,} in all"
        except Exception:  # as above
            pass
        raise ValueError(f"{self._name(index)} {problem}.")

    def _bytes(self, index: int) -> bytes:
        found = self._file(index)
        content = found.get("bytes")
        if content is None:
            try:
                with open(found.get("path") or "", "rb") as file:
                    content = file.read(MOST_BYTES + 1)
            except OSError as error:
                raise ValueError(f"{self._name(index)} cannot be read ({error.strerror}); take it out.") from error
        if len(content) > MOST_BYTES:
            raise ValueError(f"{self._name(index)} has more than {MOST_BYTES:,} bytes; make it smaller.")
        return content

    def _file(self, index: int) -> dict[str, Any]:
        return self.rows[self.numbers[index]][self.column] or {}

    def _name(self, index: int) -> str:
        path = self._file(index).get("path")
        return f"{self.source}: the image of row {self.numbers[index] + 1}{f' ({path})' if path else ''}"


def find_user_images(source: PromptsConfig) -> UserImages | None:
    """The images that the configuration names, each with a caption at least; None if it names none.

    Raises:
        ValueError: one sentence, if they cannot be read, are too few, or have no captions.
    """
    check_source(source)
    if source.train_data_dir is None and source.image_column is None:
        return None
    flags = FLAGS if source.train_data_dir is None else ("--train_data_dir", "--caption_column")
    place, column = source.train_data_dir or source.dataset_name or "", source.image_column or "image"
    named = f"{flags[0]} {place}"
    if source.train_data_dir is None:
        rows: Any = load_rows(place, source.dataset_split, source.dataset_config_name, named)
    else:
        rows = _folder(place, named)
    if not isinstance(rows.features.get(column), datasets.Image):
        raise ValueError(
            f"--image_column {column} of {place} holds no images; its columns are {', '.join(rows.features)}."
        )
    rows = rows.cast_column(column, datasets.Image(decode=False))
    rows = rows.select(range(min(len(rows), source.max_train_samples or len(rows))))
    texts = captions_of(rows, source.caption_column, place, flags)
    found = [i for i, captions in enumerate(texts) if captions]
    if len(found) < FEWEST:
        raise ValueError(f"{named} holds {len(found)} images with captions; the target needs at least {FEWEST}.")
    return UserImages(rows, column, found, [texts[i] for i in found], named)


def _folder(place: str, named: str) -> Dataset:
    """The images of a folder, whatever its subfolders are called."""
    try:
        return datasets.load_dataset("imagefolder", data_dir=place, data_files={"train": "**"}, split="train")
    except Exception as error:  # the libraries raise dozens of kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{named} cannot be read ({reason}); give a folder of images and metadata.jsonl.") from error


def user_target_images(
    images: UserImages,
    run: Distillation,
    teacher: Teacher,
    config: RunConfig,
    accelerator: Accelerator,
    chosen: Sequence[int] | None = None,
    numbers: range | None = None,
) -> TargetImages:
    """The user's images, encoded by this run or an earlier one, and with `--target_weight` below 1 the teacher's, too.

    Those of the images are taken that are `chosen`, by default all, and of the teacher's those of the `numbers`.

    Raises:
        ValueError: naming an image that cannot be decoded; those before it are cached.
        OSError: if the cache cannot be written, or if the processes share none.
    """
    weight, prompts = config.target.target_weight, run.prompts.prompts
    indices = list(range(len(images)) if chosen is None else chosen)
    own, digest = _latents(images, indices, run, teacher, config, accelerator)
    drawn = draw_target_images(run, teacher, config, accelerator, numbers if weight < 1 else range(0))
    places = torch.arange(len(own) + len(drawn))
    sources = [(weight, places[: len(own)].reshape(-1, len(indices)).T)]
    if weight < 1:
        sources.append((1 - weight, places[len(own) :, None]))
    caption_of = images.caption_of[indices].repeat(len(own) // len(indices))
    if config.prompts.prompts_file is not None:
        caption_of += len(prompts)  # they lie behind the prompts
    folder = drawn.folder / f"own-{digest}"
    folder.mkdir(exist_ok=True)
    latents, prompt_of = torch.cat([own, drawn.latents]), torch.cat([caption_of, drawn.prompt_of])
    return replace(drawn, folder=folder, latents=latents, prompt_of=prompt_of, sources=tuple(sources))


def _latents(
    images: UserImages,
    indices: list[int],
    run: Distillation,
    teacher: Teacher,
    config: RunConfig,
    accelerator: Accelerator,
) -> tuple[Tensor, str]:
    """All latents `[N, C, H, W]`, with their mirror images `[2N, C, H, W]`, and a digest of all that decides them."""
    dtype, vae, target = DTYPES[config.memory.mixed_precision], teacher.pipeline.vae, config.target
    height, width = (side * teacher.pipeline.vae_scale_factor for side in run.latent_shape[1:])
    settings = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    some = () if len(indices) == len(images) else (indices,)
    crops = (resolution_of(height, width), target.center_crop, target.random_flip)
    decides = (images.digest, *some, *crops, settings, vae.dtype)
    weights = [to_float64(parameter).sum().item() for parameter in vae.parameters()]
    digest = hashlib.sha256(repr((decides, weights)).encode()).hexdigest()[:32]
    folder = Path(config.prompts.cache_dir or datasets.config.HF_DATASETS_CACHE) / FOLDER / digest
    parts = [range(start, min(start + PART, len(indices))) for start in range(0, len(indices), PART)]

    def encode(numbers: range) -> dict[str, Tensor]:
        chosen = (indices[number] for number in numbers)
        cropped = torch.stack([_cropped(images, i, (height, width), target.center_crop) for i in chosen])
        versions = [cropped, cropped.flip(-1)] if target.random_flip else [cropped]
        tensors = {}
        for i, version in enumerate(versions):
            batches = version.split(config.memory.decode_batch_size)
            latents = torch.cat([teacher.family.encode(teacher.pipeline, batch) for batch in batches])
            tensors[str(i)] = latents.to("cpu", dtype).contiguous()
        return tensors

    with on_device([vae], accelerator.device):
        files = shared_parts(folder, parts, encode, accelerator, "your images")
    return torch.cat([file[version] for version in sorted(files[0]) for file in files]), digest


def _cropped(images: UserImages, index: int, size: tuple[int, int], center_crop: bool) -> Tensor:
    """An image, cropped in its middle or at a place that its index decides."""
    place = Draws(SEED, 2).uniform("user_crop", [index])
    return images.image(index, size, (0.5, 0.5) if center_crop else (float(place[0]), float(place[1])))
