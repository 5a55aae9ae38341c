"""What pictures are compared with: a folder, or statistics that were made of one."""

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
from .digests import digest_of_files, digest_of_tensors
from .features import Features
from .image_files import list_images
from .sealing import sealed, unsealed

FILES = (".safetensors", ".npz")


@dataclass(frozen=True)
class Reference:
    """Statistics of the data's or the teacher's pictures.

    Args:
        statistics: the features'.
        source: what they were made of, in words.
        sha256: of the pictures where these are known, else of the statistics.
        num_images: how many; None if unknown.
    """

    statistics: GaussianStatistics
    source: str
    sha256: str
    num_images: int | None = None

    def as_dict(self) -> dict[str, str | int | None]:
        """What of it moves a number, for JSON: not where it was found."""
        return {"sha256": self.sha256, "num_images": self.num_images}


def load_reference(place: str, kind: str, features: Features, device: torch.device | str = "cpu") -> Reference:
    """A reference from a folder of pictures, a file of statistics, or a tiny teacher by its name.

    Args:
        place: a folder; a `.safetensors` file that `save_reference` wrote; an `.npz` file with `mu` and `sigma`, as
            other programs write; or `tiny`, `tiny-v`, `tiny-flow`.
        kind: `data` or `teacher`.
        features: the network.
        device: where it works.

    Raises:
        ValueError: one sentence, if there is nothing of that kind, if it is damaged, or if it was made with other
            features.
    """
    reference = _load(place, kind, features, device)
    mean, covariance = reference.statistics.mean, reference.statistics.covariance
    if mean.shape != (features.dimensions,) or covariance.shape != (features.dimensions,) * 2:
        raise ValueError(
            f"--reference_{kind} {place} has statistics of {list(mean.shape)} and {list(covariance.shape)} numbers, "
            f"and --features {features.name} has {features.dimensions} features; give a reference made with the same."
        )
    if not (mean.isfinite().all() and covariance.isfinite().all() and torch.allclose(covariance, covariance.T)):
        raise ValueError(f"--reference_{kind} {place} is damaged: no pictures have such statistics; make it anew.")
    return reference


def _load(place: str, kind: str, features: Features, device: torch.device | str) -> Reference:
    if is_tiny(place):
        return _shipped(place, kind, features)
    path = Path(place)
    if path.suffix in FILES and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"--reference_{kind} {place} does not exist; give a folder of pictures or statistics.")
        return _read_safetensors(path, features) if path.suffix == ".safetensors" else _read_npz(path)
    files = list_images(path)
    statistics = GaussianStatistics.of(features.of_files(files, device))
    return Reference(statistics, str(path), digest_of_files(files), len(files))


def save_reference(reference: Reference, features: Features, path: Path) -> None:
    """Writes statistics, with what they were made of, to be given in the folder's place the next time.

    With them are their digest and that of the notes, so that damage is noticed.
    """
    tensors = {"mean": reference.statistics.mean, "covariance": reference.statistics.covariance}
    made = {
        "features": features.as_dict(),
        "source_sha256": reference.sha256,
        "num_images": reference.num_images,
        "statistics_sha256": digest_of_tensors(tensors),
    }
    save_file(tensors, aside_of(path), {"reference": json.dumps(sealed(made))})
    aside_of(path).replace(path)


def _shipped(name: str, kind: str, features: Features) -> Reference:
    if features.name != "tiny":
        raise ValueError(f"The statistics of {name} are in the tiny feature net's features; add --features tiny.")
    statistics = load_statistics(name)[kind]
    digest = digest_of_tensors({"mean": statistics.mean, "covariance": statistics.covariance})
    return Reference(statistics, f"{name}, shipped", digest)


def _read_safetensors(path: Path, features: Features) -> Reference:
    try:
        with safe_open(path, "pt") as file:
            text = file.metadata()["reference"]
            tensors = {name: file.get_tensor(name) for name in ("mean", "covariance")}
        made = _made(text)
        if made["statistics_sha256"] not in (None, digest_of_tensors(tensors)):
            raise ValueError("they were changed since they were written")
        statistics, name = GaussianStatistics(tensors["mean"], tensors["covariance"]), made["features"]["name"]
    except (SafetensorError, KeyError, TypeError, ValueError, OSError, AttributeError) as error:
        raise ValueError(f"{path} holds no statistics of ours ({error}); make them anew from the pictures.") from error
    if made["features"] != features.as_dict():
        raise ValueError(
            f"{path} was made with other features ({name}, or other weights of it); make it anew "
            f"with --features {features.name}."
        )
    return Reference(statistics, str(path), made["source_sha256"], made["num_images"])


def _made(text: str) -> dict[str, Any]:
    """What statistics were made of; version 0.1.0 noted no digest of them, and that of the pictures by another name."""
    if "statistics_sha256" in json.loads(text):
        return unsealed(text)
    older = json.loads(text)
    if older.keys() != {"features", "sha256", "num_images"}:
        raise ValueError("their notes are damaged")
    return {**older, "source_sha256": older["sha256"], "statistics_sha256": None}


def _read_npz(path: Path) -> Reference:
    """The `mu` and `sigma` of pytorch-fid and clean-fid; which features they are of is not written in them."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
    except (KeyError, ValueError, TypeError, EOFError, OSError, BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged, or has no mu and sigma; give statistics as pytorch-fid or clean-fid write."
        ) from error
    digest = digest_of_tensors({"mean": mean, "covariance": covariance})
    return Reference(GaussianStatistics(mean, covariance), str(path), digest)
