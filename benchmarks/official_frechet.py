"""Our Fréchet distances beside torch-fidelity's and clean-fid's own: on the same features, and on the same folders.

The networks of the second part have random weights, so that nothing is downloaded; distances in them mean nothing, but
must agree all the same. Run with `pip install 'rdm-diffusers[eval]'`:

    python benchmarks/official_frechet.py --output benchmarks/results/official_frechet.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torchvision
from cleanfid import fid as clean_fid
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from torch import Tensor, nn
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from rdm_diffusers.evaluation.features import load_features
from rdm_diffusers.evaluation.pictures import list_images
from rdm_diffusers.evaluation.report import machine
from rdm_diffusers.frechet import GaussianStatistics, frechet_distance

SIZES = ((500, 16), (3000, 64), (4096, 256), (200, 256))  # the last with a singular covariance
IMAGES, SIDE = 64, 96


def made_features(count: int, dimensions: int, seed: int) -> Tensor:
    """Correlated features `[N, D]` with a mean of their own, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64) / dimensions**0.5
    noise = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    return noise @ mix + 0.3 * torch.randn(dimensions, generator=generator, dtype=torch.float64)


def by_torch_fidelity(a: Tensor, b: Tensor) -> float:
    statistics = [fid_features_to_statistics(features) for features in (a, b)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def by_clean_fid(a: Tensor, b: Tensor) -> float:
    return float(clean_fid.fid_from_feats(a.numpy(), b.numpy()))


def ours(a: Tensor, b: Tensor) -> float:
    return frechet_distance(GaussianStatistics.of(a), GaussianStatistics.of(b))


def attempted(measure: Callable[[], float]) -> float | str:
    """The number, or in words why there is none."""
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def row(own: float, **others: float | str) -> dict:
    """Our number, theirs, and the relative differences."""
    relative = {name: abs(own - value) / abs(value) for name, value in others.items() if isinstance(value, float)}
    return {"ours": own, **others, "relative_difference": relative}


def on_features() -> list[dict]:
    """All three formulas on the same features."""
    rows = []
    for count, dimensions in SIZES:
        a, b = made_features(count, dimensions, 0), made_features(count, dimensions, 1)
        theirs = {"torch_fidelity": attempted(lambda: by_torch_fidelity(a, b)),  # noqa: B023 - called at once
                  "clean_fid": attempted(lambda: by_clean_fid(a, b))}  # noqa: B023 # fmt: skip
        rows.append({"images": count, "dimensions": dimensions, **row(ours(a, b), **theirs)})
    return rows


class Untrained(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception with random weights of a usual size."""

    def load_state_dict(self, *args: object, **kwargs: object) -> None:  # type: ignore[override]
        torch.manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)


class Scripted(nn.Module):
    """The same network in the shape that clean-fid loads."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Layers(nn.Module):
    """Scaled pictures `[B, 3, 299, 299]` -> `[B, 2048]`."""

    def __init__(self, network: FeatureExtractorInceptionV3):
        super().__init__()
        stem = [network.Conv2d_1a_3x3, network.Conv2d_2a_3x3, network.Conv2d_2b_3x3, network.MaxPool_1,
                network.Conv2d_3b_1x1, network.Conv2d_4a_3x3, network.MaxPool_2]  # fmt: skip
        blocks = [block for name, block in network.named_children() if name.startswith("Mixed_")]
        self.all = nn.Sequential(*stem, *blocks, network.AvgPool)

    def forward(self, x: Tensor) -> Tensor:
        return self.all(x)


def write_weights(folder: Path) -> tuple[str, str]:
    """Random weights as torch-fidelity and as clean-fid load them."""
    placeholder = folder / "empty.pth"
    torch.save({}, placeholder)
    network = Untrained("untrained", ["2048"], str(placeholder))
    torch.save(network.state_dict(), folder / "inception.pth")
    example = torch.rand(1, 3, 299, 299) * 2 - 1
    torch.jit.trace(Scripted(Layers(network)).eval(), example).save(str(folder / "inception-2015-12-05.pt"))
    return str(folder / "inception.pth"), str(folder / "inception-2015-12-05.pt")


def write_pictures(folder: Path, seed: int, softness: int) -> Path:
    """Soft coloured noise."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for i in range(IMAGES):
        small = Image.fromarray(random.integers(0, 256, (softness, softness, 3), np.uint8))
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


def on_folders(work: Path) -> dict:
    """Whole programs on the same two folders: reading, resizing, network and formula."""
    weights, scripted = write_weights(work)
    a, b = write_pictures(work / "a", 0, 6), write_pictures(work / "b", 1, 9)

    def own(name: str, path: str) -> float:
        features = load_features(name, path)
        return ours(*(features.of_files(list_images(folder)) for folder in (a, b)))

    theirs = calculate_metrics(
        input1=str(a), input2=str(b), fid=True, feature_extractor_weights_path=weights, cuda=False, batch_size=16,
        verbose=False, cache=False, save_cpu_ram=True,
    )["frechet_inception_distance"]  # fmt: skip
    model = InceptionV3W(str(work), download=False).eval()
    clean = attempted(
        lambda: float(
            clean_fid.compare_folders(str(a), str(b), model, "clean", device=torch.device("cpu"), verbose=False)
        )
    )
    features = load_features("inception-clean", scripted).of_files(list_images(a)).numpy()
    expected = clean_fid.get_folder_features(
        str(a), model, num_workers=0, batch_size=8, device=torch.device("cpu"), mode="clean", verbose=False
    )
    return {
        "images": IMAGES,
        "inception": row(own("inception", weights), torch_fidelity=float(theirs)),
        "inception-clean": row(own("inception-clean", scripted), clean_fid=clean),
        "clean_features_relative_difference": float(np.abs(features - expected).max() / np.abs(expected).max()),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        result = {"on_features": on_features(), "on_folders": on_folders(Path(work))}
    packages = ("torch", "torch-fidelity", "clean-fid", "scipy", "numpy", "pillow")
    result["versions"] = {name: version(name) for name in packages} | {"torchvision": torchvision.__version__}
    result["machine"] = machine()
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
