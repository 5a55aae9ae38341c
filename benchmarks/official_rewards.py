"""Our HPSv2, ImageReward and HPSv3 beside the official packages: same weights, same photographs, same prompts.

Weights are random. The whole computation from an image and a prompt to a number is compared. First run
`official_scores.py` in an environment of its own, at both sizes, then (with the package hpsv3, installed by
`pip install --no-deps hpsv3`)

    python benchmarks/official_rewards.py --work_dirs official-small official-full
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from runs import write_result
from torch import Tensor

from rdm_diffusers.rewards import evaluate, load_reward
from rdm_diffusers.rewards.hpsv3 import HpsV3
from rdm_diffusers.rewards.preprocessing import CLIP_STD


def picture(path: Path) -> Tensor:
    """A PNG file as `[1, 3, H, W]` in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255


def tokens(reward, prompts: list[str], length: int) -> Tensor:
    """Our tokenizer's ids of the prompts, padded with 0."""
    prompts = [getattr(reward, "cleaned", str)(prompt) for prompt in prompts]
    ids = reward.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return ids.input_ids * ids.attention_mask


def pixel_errors(ours: Tensor, official: Tensor) -> dict[str, float]:
    """Errors of normalised images `[..., 3, H, W]`, in units of 1/255."""
    error = ((ours - official) * torch.tensor(CLIP_STD)[:, None, None]).abs() * 255
    return {"pixel_error_mean": error.mean().item(), "pixel_error_max": error.max().item()}


def score_errors(ours: list[Tensor], on_official_pixels: list[Tensor], official: Tensor) -> dict[str, float]:
    """Errors of scores, one tensor over the prompts for each image, beside the scores' own variation."""
    return {
        "score_difference_max": (torch.stack(ours) - official).abs().max().item(),
        "score_difference_max_on_the_official_pixels": (torch.stack(on_official_pixels) - official).abs().max().item(),
        "score_mean": official.mean().item(),
        "score_deviation_between_pictures": official.std(0).mean().item(),
        "score_deviation_between_prompts": official.std(1).mean().item(),
    }


@torch.no_grad()
def compare(folder: Path, name: str, record: dict) -> dict[str, float]:
    """How far our HPSv2 or ImageReward is from the official one."""
    official = torch.load(folder / name / "official.bin", weights_only=True)
    reward = load_reward(f"{name}={folder / name}", "cpu").reward
    pictures, prompts = [picture(folder / file) for file in record["pictures"]], record["prompts"]
    errors = pixel_errors(torch.cat([reward.preprocessing(one) for one in pictures]), official["pixels"])  # type: ignore[attr-defined]
    ours, same = [evaluate(reward, one.expand(len(prompts), -1, -1, -1), prompts) for one in pictures], []
    for one in official["pixels"]:
        reward.preprocessing = one.expand_as  # type: ignore[attr-defined]
        same.append(evaluate(reward, one.expand(len(prompts), -1, -1, -1), prompts))
    agree = official["ids"] == tokens(reward, prompts, official["ids"].shape[1])
    counts = {"prompts_with_the_same_tokens": int(agree.all(1).sum()), "prompts": len(prompts)}
    return {**errors, **counts, **score_errors(ours, same, official["scores"])}


@torch.no_grad()
def compare_hpsv3(folder: Path, name: str, record: dict) -> dict[str, float]:
    """The same for HPSv3, whose pictures are patches of many sizes."""
    official = torch.load(folder / name / "official.bin", weights_only=True)
    reward = load_reward(f"{name}={folder / name}", "cpu").reward
    assert isinstance(reward, HpsV3)
    pictures, prompts = [picture(folder / file) for file in record["pictures"]], record["prompts"]
    found = [reward.patches(one) for one in pictures]
    given = official["patches"].split([len(patches) for patches, _ in found])
    channels = [patches.unflatten(1, (3, -1, 1)) for patches in (torch.cat([p for p, _ in found]), official["patches"])]
    ours, same = [evaluate(reward, one.expand(len(prompts), -1, -1, -1), prompts) for one in pictures], []
    for patches, (_, grid) in zip(given, found, strict=True):
        reward.patches = lambda images, p=patches, g=grid: (p.repeat(len(images), 1), g)  # type: ignore
        same.append(evaluate(reward, torch.zeros(len(prompts), 3, 1, 1), prompts))
    return {**pixel_errors(*channels), "prompts": len(prompts), **score_errors(ours, same, official["scores"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dirs", type=Path, nargs="+", required=True, help="folders of official_scores.py")
    results = {}
    for folder in parser.parse_args().work_dirs:
        record = json.loads((folder / "official.json").read_text())
        found = {name: compare(folder, name, record) for name in ("hpsv2", "image_reward")}
        if (folder / "hpsv3").is_dir():
            found["hpsv3"] = compare_hpsv3(folder, "hpsv3", record)
        results[record["size"]] = {"official_versions": record["versions"], **found}
    write_result("official_rewards", {"results": results})


if __name__ == "__main__":
    main()
