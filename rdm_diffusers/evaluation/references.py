"""References of Fréchet distances: the statistics of a folder of pictures, computed or read from a file."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..folders import aside_of
from ..frechet import GaussianStatistics
from ..tiny import is_tiny
from ..tiny.reference import load_statistics
from .digests import digest_of_files, digest_of_tensors, sealed, unsealed
from .features import Features
from .pictures import list_images

FILES = (".safetensors", ".npz")


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
            other programs write; or `tiny`, `tiny-v`, `tiny-flow`.
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
        return _tiny_reference(place, kind, features)
    path = Path(place)
    if path.suffix in FILES and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"--reference_{kind} {place} does not exist; give a folder of pictures or statistics.")
        return _read_safetensors(path, features) if path.suffix == ".safetensors" else _read_npz(path)
    files = list_images(path)
    statistics = GaussianStatistics.of(features.of_files(files, device))
    return Reference(statistics, str(path), digest_of_files(files), len(files))


def save_reference(reference: Reference, features: Features, path: Path) -> None:
    """Writes statistics that `load_reference` reads in place of the pictures, with digests that reveal damage."""
    tensors = _as_tensors(reference.statistics)
    origin = {
        "features": features.as_dict(),
        "source_sha256": reference.sha256,
        "num_images": reference.num_images,
        "statistics_sha256": digest_of_tensors(tensors),
    }
    save_file(tensors, aside_of(path), {"reference": json.dumps(sealed(origin))})
    aside_of(path).replace(path)


def _as_tensors(statistics: GaussianStatistics) -> dict[str, torch.Tensor]:
    return {"mean": statistics.mean, "covariance": statistics.covariance}


def _tiny_reference(name: str, kind: str, features: Features) -> Reference:
    if features.name != "tiny":
        raise ValueError(f"The statistics of {name} are of the tiny feature network; add --features tiny.")
    statistics = load_statistics(name)[kind]
    return Reference(statistics, f"{name}, shipped", digest_of_tensors(_as_tensors(statistics)))


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
    return Reference(statistics, str(path), digest_of_tensors(_as_tensors(statistics)))
