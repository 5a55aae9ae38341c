"""What the official packages of HPSv2 and ImageReward say of two photographs, with random weights.

To be run in an environment of its own, because the packages do not live beside ours (old pins, no transformers 5):

    pip install torch numpy pillow ftfy regex scikit-learn transformers==4.35.2
    pip install --no-deps hpsv2==1.2.0 image-reward==1.5 open_clip_torch torchvision timm==0.6.13 fairscale clint args
    python benchmarks/official_scores.py --work_dir official --size small

It leaves in the folder what `official_rewards.py` compares with: weights in the published form, the photographs,
prompts, tokens, preprocessed pictures and scores. Only what stands in the way of an import is worked around, and only
here: the packages' `__init__`, which import what is not needed, the vocabulary that hpsv2's wheel lacks (open_clip has
the same), and the operators of torchvision's that a torch without CUDA lacks.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

PROMPTS = [
    "a photo of a Chinese temple, in front of it a few people",
    "A PINK dahlia; it's in bloom (macro, f/2.8) 8k",
    "naïve café — “painting” of a lotus 花 &amp; more",
    " ".join(["a very long prompt about a tower by the lake"] * 12),
    "two   words\n",
    "",
]
CROPS = {"wide": (427, 640), "square": (427, 427), "tall": (300, 201), "small": (96, 120)}
CLIP_SMALL = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 224, "layers": 3, "width": 80, "head_width": 40, "patch_size": 28},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
}
BERT_SMALL = {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 256}
BERT_FULL = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BERT = {  # the rest of BLIP's med_config.json
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "pad_token_id": 0,
    "vocab_size": 30524, "encoder_width": 768, "add_cross_attention": True,
}  # fmt: skip
VIT_SMALL = {"embed_dim": 96, "depth": 3, "num_heads": 4}


def package(name: str) -> Path:
    """The folder of a package, whose `__init__` is put out of the way."""
    folder = Path(find_spec(name).submodule_search_locations[0])  # type: ignore[union-attr, index]
    sys.modules[name] = module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    return folder


def clear_the_way() -> None:
    """Lets the packages be imported; see above."""
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    clear_the_way.library = library  # type: ignore[attr-defined]
    vocabulary = Path(find_spec("open_clip").submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"  # type: ignore[union-attr, index]
    target = package("hpsv2") / "src/open_clip" / vocabulary.name
    if not target.exists():
        target.write_bytes(vocabulary.read_bytes())
    folder = package("ImageReward")
    sys.modules["ImageReward.models"] = models = types.ModuleType("ImageReward.models")
    models.__path__ = [str(folder / "models")]


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Matrices that neither shrink nor blow up; biases and norms that are not 0 and 1, so that no two are confused."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def photographs(folder: Path) -> list[Path]:
    """The two photographs of scikit-learn's, cut to several shapes, as PNG files."""
    paths = []
    for name in ("china", "flower"):
        picture = load_sample_image(f"{name}.jpg")
        for crop, (height, width) in CROPS.items():
            paths.append(folder / f"{name}-{crop}.png")
            Image.fromarray(np.ascontiguousarray(picture[:height, :width])).save(paths[-1])
    return paths


@torch.no_grad()
def hpsv2_scores(folder: Path, paths: list[Path], full: bool) -> dict[str, torch.Tensor]:
    """As `hpsv2.score`: its model, its preprocessing, its tokens, the diagonal of its features' product."""
    from hpsv2.src.open_clip import tokenizer as tokens
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.transform import image_transform

    configs = Path(find_spec("hpsv2.src.open_clip").submodule_search_locations[0]) / "model_configs"  # type: ignore[union-attr, index]
    config = json.loads((configs / "ViT-H-14.json").read_text()) if full else CLIP_SMALL
    model = randomise(CLIP(**config, output_dict=True))
    preprocess = image_transform(224, is_train=False, resize_longest_max=True)
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    save_clip_tokenizer(folder, tokens._tokenizer)
    if not full:
        (folder / "config.json").write_text(json.dumps(clip_config(config)))
    pixels = torch.stack([preprocess(Image.open(path)) for path in paths])
    ids = tokens.tokenize(PROMPTS)
    scores = []
    for picture in pixels.split(1):
        out = model(picture, ids)
        scores.append((out["image_features"] @ out["text_features"].T)[0])
    return {"pixels": pixels, "ids": ids, "scores": torch.stack(scores)}


def clip_config(config: dict) -> dict:
    """open_clip's configuration in transformers' words."""
    text, vision = config["text_cfg"], config["vision_cfg"]
    towers = {
        "text_config": {
            "hidden_size": text["width"], "intermediate_size": 4 * text["width"], "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"], "hidden_act": "gelu",
        },
        "vision_config": {
            "hidden_size": vision["width"], "intermediate_size": 4 * vision["width"],
            "patch_size": vision["patch_size"], "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "hidden_act": "gelu",
        },
    }  # fmt: skip
    return {"model_type": "clip", "projection_dim": config["embed_dim"], **towers}


def save_clip_tokenizer(folder: Path, tokenizer) -> None:
    """hpsv2's byte-pair encoding in the files that transformers reads."""
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({names.get(k, k): v for k, v in tokenizer.encoder.items()}))
    merges = [" ".join(pair) for pair in tokenizer.bpe_ranks]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


@torch.no_grad()
def image_reward_scores(folder: Path, paths: list[Path], full: bool) -> dict[str, torch.Tensor]:
    """As `ImageReward.score`, the package's own function from path and prompt to number."""
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer
    from transformers import BertTokenizer

    words = sorted({word for prompt in PROMPTS for word in prompt.lower().split()})
    letters = sorted({letter for word in words for letter in word})
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *words[::2],
        *letters,
        *("##" + letter for letter in letters),
    ]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    blip_pretrain.init_tokenizer = partial(BertTokenizer, str(folder / "vocab.txt"))
    (folder / "med_config.json").write_text(json.dumps({**BERT, **(BERT_FULL if full else BERT_SMALL)}))
    if not full:
        vision = VisionTransformer(img_size=224, patch_size=16, **VIT_SMALL)
        blip_pretrain.create_vit = lambda *_: (vision, VIT_SMALL["embed_dim"])
        (folder / "config.json").write_text(json.dumps(blip_config()))
    model = randomise(ImageReward(str(folder / "med_config.json")))
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    pixels = torch.stack([model.preprocess(Image.open(path)) for path in paths])
    ids = model.blip.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    scores = [[model.score(prompt, str(path)) for prompt in PROMPTS] for path in paths]
    return {"pixels": pixels, "ids": ids.input_ids, "scores": torch.tensor(scores)}


def blip_config() -> dict:
    """The small BLIP in transformers' words."""
    text = {**BERT_SMALL, "encoder_hidden_size": VIT_SMALL["embed_dim"], "vocab_size": 30524, "is_decoder": True}
    vision = {
        "hidden_size": VIT_SMALL["embed_dim"], "intermediate_size": 4 * VIT_SMALL["embed_dim"],
        "num_hidden_layers": VIT_SMALL["depth"], "num_attention_heads": VIT_SMALL["num_heads"], "image_size": 224,
        "patch_size": 16, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    return {"model_type": "blip", "text_config": text, "vision_config": vision}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="where to leave weights and scores")
    parser.add_argument("--size", choices=("small", "full"), default="small", help="full: the published sizes, 6 GB")
    args = parser.parse_args()
    clear_the_way()
    torch.manual_seed(0)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    paths = photographs(args.work_dir)[: None if args.size == "small" else 2]
    for name, score in ("hpsv2", hpsv2_scores), ("image_reward", image_reward_scores):
        folder = args.work_dir / name
        folder.mkdir(exist_ok=True)
        torch.save(score(folder, paths, args.size == "full"), folder / "official.bin")
    packages = ("torch", "torchvision", "transformers", "pillow", "hpsv2", "image-reward", "timm")
    record = {"pictures": [path.name for path in paths], "prompts": PROMPTS, "size": args.size}
    record["versions"] = {name: version(name) for name in packages}
    (args.work_dir / "official.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
