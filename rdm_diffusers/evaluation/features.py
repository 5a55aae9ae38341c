"""The feature networks of Fréchet distances, each with its own resizing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ..tiny.classifier import FEATURE_DIM, load_classifier
from ..tiny.handwriting import IMAGE_SIZE
from .digests import digest_of_tensors
from .pictures import read_batches

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
        batches = read_batches(files, f"{self.name} features")
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


def _tiny(weights: str | None, device: torch.device) -> Features:
    """The tiny teachers' classifier, for pictures of their size only."""
    if weights is not None:
        raise ValueError("The package contains the tiny feature network; leave --feature_weights out.")
    network = load_classifier().to(device)

    def extract(images: Tensor) -> Tensor:
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"The tiny feature network reads pictures of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, not "
                f"{images.shape[-2]} x {images.shape[-1]}; use --features inception."
            )
        return network.features(images.float() / 255)

    return Features("tiny", FEATURE_DIM, extract, "none", digest_of_tensors(network.state_dict()))


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
            with _as_file(_read_tensors(weights)) as safe:
                network = FeatureExtractorInceptionV3("inception", [INCEPTION_LAYER], safe)
    except (OSError, RuntimeError) as error:
        raise _unloadable(weights, error) from error
    network = network.to(device)
    return Features(
        "inception", INCEPTION_FEATURES, lambda images: network(images)[0],
        f"bilinear to {INCEPTION_SIZE} without antialiasing, as TensorFlow 1 (torch-fidelity)",
        digest_of_tensors(network.state_dict()),
    )  # fmt: skip


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


def _read_tensors(path: str) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file, or of a `.pth` that holds only tensors; no code in it is executed."""
    try:
        content = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
        return {name: tensor for name, tensor in dict(content).items() if isinstance(tensor, Tensor)}
    except Exception as error:  # torch.load raises many kinds
        raise _unloadable(path, error) from error


@contextmanager
def _as_file(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """A temporary file of tensors, for a library that unpickles any file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(dict(tensors), path)
        yield str(path)


def _unloadable(weights: str | None, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if weights is None:
        return ValueError(
            f"The Inception weights could not be downloaded ({reason}); give their file with --feature_weights."
        )
    return ValueError(f"{weights} holds no Inception weights ({reason}); download them again.")


FEATURES: dict[str, Callable[[str | None, torch.device], Features]] = {
    "tiny": _tiny,
    "inception": _inception,
    "inception-clean": _clean,
}
