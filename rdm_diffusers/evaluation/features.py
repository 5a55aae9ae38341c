"""Feature networks of Fréchet distances, each with its own resizing, and references: statistics of pictures in them."""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..folders import aside_of
from ..frechet import GaussianStatistics
from ..tiny import is_tiny
from ..tiny.domains import DOMAINS, Domain, domain_of
from ..tiny.reference import load_statistics
from .pictures import list_images, read_batches
from .records import digest_of_files, digest_of_tensors, sealed, unsealed

EXTRA = "pip install 'rdm-diffusers[eval]'"
INCEPTION_SIZE, INCEPTION_FEATURES = 299, 2048
INCEPTION_LAYER = str(INCEPTION_FEATURES)  # torch-fidelity's name of the layer


@dataclass(frozen=True)
class Features:
    """A feature network.

    Args:
        name: one of `FEATURES`.
        dimensions: D.
        extract: pictures `[B, 3, H, W]`, uint8, on any device -> features `[B, D]`, float32. No gradients.
        resize: how pictures are resized for the network, in words.
        weights_sha256: of the weights' names and numbers.
    """

    name: str
    dimensions: int
    extract: Callable[[Tensor], Tensor]
    resize: str
    weights_sha256: str

    @torch.no_grad()
    def of_files(self, files: Sequence[Path], device: torch.device | str = "cpu") -> Tensor:
        """Features `[N, D]` of pictures, on the CPU, in the files' order; ValueError as `read_batches`."""
        return self.of_batches(read_batches(files, f"{self.name} features"), device)

    @torch.no_grad()
    def of_batches(self, batches: Iterable[Tensor], device: torch.device | str = "cpu") -> Tensor:
        """The same of pictures `[B, 3, H, W]`, uint8, batch by batch."""
        return torch.cat([self.extract(batch.to(device)).float().cpu() for batch in batches])

    def as_dict(self) -> dict[str, str]:
        """What affects a distance, for JSON."""
        return {"name": self.name, "resize": self.resize, "weights_sha256": self.weights_sha256}


def load_features(name: str, weights: str | None = None, device: torch.device | str = "cpu") -> Features:
    """A feature network.

    Args:
        name: one of `FEATURES`.
        weights: the Inception weights' file; None to download them.
        device: where it runs.

    Raises:
        ValueError: one sentence, if the weights are missing, damaged or cannot be downloaded.
        ImportError: naming the extra, if the package is missing.
    """
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"--feature_weights {weights} does not exist; give the file of the Inception weights.")
    return FEATURES[name](weights, torch.device(device))


def _tiny(domain: Domain, weights: str | None, device: torch.device) -> Features:
    """The classifier of some tiny teachers, for pictures of their size only."""
    if weights is not None:
        raise ValueError("The package contains the tiny feature network; leave --feature_weights out.")
    network, size = domain.load_reader().to(device), domain.image_size

    def extract(images: Tensor) -> Tensor:
        if images.shape[-2:] != (size, size):
            raise ValueError(
                f"The {domain.name} feature network reads pictures of {size} x {size} pixels, not "
                f"{images.shape[-2]} x {images.shape[-1]}; use --features inception."
            )
        return network.features(images.float() / 255)

    return Features(domain.name, domain.feature_dim, extract, "none", digest_of_tensors(network.state_dict()))


def _inception(weights: str | None, device: torch.device) -> Features:
    """torch-fidelity's port of the FID Inception, which also resizes as TensorFlow 1 did."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(f"--features inception needs torch-fidelity: {EXTRA}.") from error
    try:
        if weights is None:
            network = FeatureExtractorInceptionV3("inception", [INCEPTION_LAYER], verbose=False)
        else:
            with tempfile.TemporaryDirectory() as folder:  # torch-fidelity would unpickle any file
                safe = f"{folder}/weights.pth"
                torch.save(_read_tensors(weights), safe)
                network = FeatureExtractorInceptionV3("inception", [INCEPTION_LAYER], safe)
    except (OSError, RuntimeError) as error:
        raise _unloadable(weights, error) from error
    network = network.to(device)
    resize = f"bilinear to {INCEPTION_SIZE} without antialiasing, as TensorFlow 1 (torch-fidelity)"
    digest = digest_of_tensors(network.state_dict())
    return Features("inception", INCEPTION_FEATURES, lambda images: network(images)[0], resize, digest)


def _clean(weights: str | None, device: torch.device) -> Features:
    """clean-fid's: resized by PIL's bicubic filter with antialiasing (arXiv 2104.11222); TorchScript weights."""
    try:
        from cleanfid.inception_torchscript import InceptionV3W
    except ImportError as error:
        raise ImportError(f"--features inception-clean needs clean-fid: {EXTRA}.") from error
    with tempfile.TemporaryDirectory() as folder:
        try:
            if weights is not None:
                shutil.copyfile(weights, Path(folder) / "inception-2015-12-05.pt")  # the name that clean-fid expects
            network = InceptionV3W(folder, download=weights is None).to(device).eval()
        except (OSError, RuntimeError) as error:
            raise _unloadable(weights, error) from error

    def extract(images: Tensor) -> Tensor:
        return network(torch.stack([resize_clean(image) for image in images.cpu()]).to(device))

    resize = f"bicubic to {INCEPTION_SIZE} with antialiasing, not rounded (Pillow, as clean-fid)"
    return Features("inception-clean", INCEPTION_FEATURES, extract, resize, digest_of_tensors(network.state_dict()))


def resize_clean(image: Tensor) -> Tensor:
    """`[3, H, W]` uint8 -> `[3, 299, 299]` float32 in [0, 255]: bicubic with antialiasing, channel by channel."""
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    channels = [Image.fromarray(channel.numpy()).resize(size, Image.Resampling.BICUBIC) for channel in image.float()]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 255)


def _read_tensors(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a `.pth` that holds only tensors; no code in it is executed."""
    try:
        content = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
        return {name: tensor for name, tensor in dict(content).items() if isinstance(tensor, Tensor)}
    except Exception as error:  # torch.load raises many kinds
        raise _unloadable(path, error) from error


def _unloadable(weights: str | None, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if weights is None:
        return ValueError(
            f"The Inception weights could not be downloaded ({reason}); give their file with --feature_weights."
        )
    return ValueError(f"{weights} holds no Inception weights ({reason}); download them again.")


FEATURES: dict[str, Callable[[str | None, torch.device], Features]] = {
    **{name: partial(_tiny, domain) for name, domain in DOMAINS.items()},
    "inception": _inception,
    "inception-clean": _clean,
}


@dataclass(frozen=True)
class Reference:
    """Statistics of the data's or the teacher's pictures.

    Args:
        statistics: the features'.
        source: a folder, a file or a tiny teacher.
        sha256: of the pictures if they are available, else of the statistics.
        num_images: how many; None if unknown.
    """

    statistics: GaussianStatistics
    source: str
    sha256: str
    num_images: int | None = None

    def as_dict(self) -> dict[str, str | int | None]:
        """What affects a distance, for JSON; the place does not."""
        return {"sha256": self.sha256, "num_images": self.num_images}


def load_reference(place: str, kind: str, features: Features, device: torch.device | str = "cpu") -> Reference:
    """A reference from a folder of pictures, a file of statistics, or a tiny teacher by its name.

    Args:
        place: a folder; a `.safetensors` file that `save_reference` wrote; an `.npz` file with `mu` and `sigma`, as
            other programs write; or a tiny teacher's name.
        kind: `data` or `teacher`.
        features: the network.
        device: where the network runs.

    Raises:
        ValueError: one sentence, if the place does not exist, is damaged, or was made with other features.
    """
    reference = _load(place, kind, features, device)
    mean, covariance = reference.statistics.mean, reference.statistics.covariance
    if mean.shape != (features.dimensions,) or covariance.shape != (features.dimensions,) * 2:
        raise ValueError(
            f"--reference_{kind} {place} has statistics of {list(mean.shape)} and {list(covariance.shape)} numbers, "
            f"and --features {features.name} has {features.dimensions} features; give a reference made with the same."
        )
    if not (mean.isfinite().all() and covariance.isfinite().all() and torch.allclose(covariance, covariance.T)):
        raise ValueError(f"--reference_{kind} {place} is damaged: no pictures have such statistics; make it again.")
    return reference


def _load(place: str, kind: str, features: Features, device: torch.device | str) -> Reference:
    if is_tiny(place):
        name = domain_of(place).name
        if features.name != name:
            raise ValueError(f"The statistics of {place} are of the {name} feature network; add --features {name}.")
        statistics = load_statistics(place)[kind]
        return Reference(statistics, f"{place}, shipped", digest_of_tensors(vars(statistics)))
    path = Path(place)
    if path.suffix in (".safetensors", ".npz") and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"--reference_{kind} {place} does not exist; give a folder of pictures or statistics.")
        return _read_safetensors(path, features) if path.suffix == ".safetensors" else _read_npz(path)
    files = list_images(path)
    statistics = GaussianStatistics.of(features.of_files(files, device))
    return Reference(statistics, str(path), digest_of_files(files), len(files))


def save_reference(reference: Reference, features: Features, path: Path) -> None:
    """Writes statistics that `load_reference` reads in place of the pictures, with digests that reveal damage."""
    tensors = dict(vars(reference.statistics))
    origin = {
        "features": features.as_dict(),
        "source_sha256": reference.sha256,
        "num_images": reference.num_images,
        "statistics_sha256": digest_of_tensors(tensors),
    }
    save_file(tensors, aside_of(path), {"reference": json.dumps(sealed(origin))})
    aside_of(path).replace(path)


def _read_safetensors(path: Path, features: Features) -> Reference:
    try:
        with safe_open(path, "pt") as file:
            origin = _read_origin(file.metadata()["reference"])
            tensors = {name: file.get_tensor(name) for name in ("mean", "covariance")}
        if origin["statistics_sha256"] not in (None, digest_of_tensors(tensors)):
            raise ValueError("they were changed since they were written")
        statistics, name = GaussianStatistics(**tensors), origin["features"]["name"]
    except (SafetensorError, KeyError, TypeError, ValueError, OSError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no statistics of rdm-evaluate ({error}); make them again from the pictures."
        ) from error
    if origin["features"] != features.as_dict():
        raise ValueError(
            f"{path} was made with other features ({name}, or other weights of it); make it again "
            f"with --features {features.name}."
        )
    return Reference(statistics, str(path), origin["source_sha256"], origin["num_images"])


def _read_origin(text: str) -> dict[str, Any]:
    """What statistics were made of; in version 0.1.0 without their digest, and with another name of the pictures'."""
    origin = json.loads(text)
    if "statistics_sha256" in origin:
        return unsealed(text)
    if origin.keys() != {"features", "sha256", "num_images"}:
        raise ValueError("the notes on their origin are damaged")
    return {**origin, "source_sha256": origin["sha256"], "statistics_sha256": None}


def _read_npz(path: Path) -> Reference:
    """The `mu` and `sigma` of pytorch-fid and clean-fid, which do not name their features."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
    except (KeyError, ValueError, TypeError, EOFError, OSError, BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged, or has no mu and sigma; give statistics as pytorch-fid or clean-fid write."
        ) from error
    statistics = GaussianStatistics(mean, covariance)
    return Reference(statistics, str(path), digest_of_tensors(vars(statistics)))
