"""Our HPSv2 and ImageReward beside the official packages: same weights, same photographs, same prompts.

Weights are random; what is compared is the whole way from a picture and a prompt to a number. First run
`official_scores.py` in an environment of its own, at both sizes, then

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
from rdm_diffusers.rewards.preprocessing import CLIP_STD


def picture(path: Path) -> Tensor:
    """A PNG file as `[1, 3, H, W]` in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255


def tokens(reward, prompts: list[str], length: int) -> Tensor:
    """What our tokenizer makes of the prompts, padded with 0."""
    prompts = [getattr(reward, "cleaned", str)(prompt) for prompt in prompts]
    ids = reward.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return ids.input_ids * ids.attention_mask


@torch.no_grad()
def compare(folder: Path, name: str, record: dict) -> dict[str, float]:
    """How far our reward is from the official one: pixels in units of 1/255, scores in their own units."""
    official = torch.load(folder / name / "official.bin", weights_only=True)
    reward = load_reward(f"{name}={folder / name}", "cpu").reward
    paths, prompts = [folder / file for file in record["pictures"]], record["prompts"]
    pixels = torch.cat([reward.preprocessing(picture(path)) for path in paths])  # type: ignore[attr-defined]
    error = ((pixels - official["pixels"]) * torch.tensor(CLIP_STD)[:, None, None]).abs() * 255
    ours = [evaluate(reward, picture(path).expand(len(prompts), -1, -1, -1), prompts) for path in paths]
    same = []
    for found in official["pixels"]:
        reward.preprocessing = found.expand_as  # type: ignore[attr-defined]
        same.append(evaluate(reward, found.expand(len(prompts), -1, -1, -1), prompts))
    pairs = official["ids"] == tokens(reward, prompts, official["ids"].shape[1])
    return {
        "pixel_error_mean": error.mean().item(),
        "pixel_error_max": error.max().item(),
        "prompts_with_the_same_tokens": int(pairs.all(1).sum()),
        "prompts": len(prompts),
        "score_difference_max": (torch.stack(ours) - official["scores"]).abs().max().item(),
        "score_difference_max_on_the_official_pixels": (torch.stack(same) - official["scores"]).abs().max().item(),
        "score_mean": official["scores"].mean().item(),
        "score_deviation_between_pictures": official["scores"].std(0).mean().item(),
        "score_deviation_between_prompts": official["scores"].std(1).mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dirs", type=Path, nargs="+", required=True, help="folders of official_scores.py")
    results = {}
    for folder in parser.parse_args().work_dirs:
        record = json.loads((folder / "official.json").read_text())
        found = {name: compare(folder, name, record) for name in ("hpsv2", "image_reward")}
        results[record["size"]] = {"official_versions": record["versions"], **found}
    write_result("official_rewards", {"results": results})


if __name__ == "__main__":
    main()
