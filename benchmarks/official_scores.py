"""The scores of two photographs by the official packages of HPSv2, ImageReward and HPSv3, with random weights.

Run it in an environment of its own, because the packages conflict with ours (old pins, no transformers 5):

    pip install torch numpy pillow ftfy regex scikit-learn transformers==4.45.2
    pip install --no-deps hpsv2==1.2.0 image-reward==1.5 hpsv3==1.0.0 open_clip_torch
    pip install --no-deps torchvision timm==0.6.13 fairscale clint args
    python benchmarks/official_scores.py --work_dir official --size small

It writes what `official_rewards.py` compares with: weights in the published form, the photographs, prompts, tokens,
preprocessed images and scores. Only obstacles to the imports are worked around, and only here: the packages'
`__init__`, which import more than is needed, the vocabulary that hpsv2's wheel lacks (open_clip has the same), and
torchvision's operators that a torch without CUDA lacks.
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
from safetensors.torch import save_file
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
QWEN_SMALL = {  # vision_config in the words of transformers 4.45; HPSv3 is compared at small size only
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rms_norm_eps": 1e-6,
    "vision_config": {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
}  # fmt: skip
HPSV3_NEEDS = (  # of training, and not installed
    "matplotlib", "matplotlib.pyplot", "matplotlib.patches", "torch.utils.tensorboard", "pandas", "datasets", "peft",
    "trl", "hpsv3.utils.training_utils",
)  # fmt: skip
VIT_SMALL = {"embed_dim": 96, "depth": 3, "num_heads": 4}


def package(name: str) -> Path:
    """The folder of a package, whose `__init__` is skipped."""
    folder = Path(find_spec(name).submodule_search_locations[0])  # type: ignore[union-attr, index]
    sys.modules[name] = module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    return folder


class StandIn(types.ModuleType):
    """A module with an empty class by every name, for imports that are not used."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


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
    package("hpsv3")


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


@torch.no_grad()
def hpsv3_scores(folder: Path, paths: list[Path], full: bool) -> dict[str, torch.Tensor]:
    """The package's model on its own resized pictures, patches by Qwen's processor; the text in Qwen's chat form."""
    import transformers.trainer  # noqa: F401 - it must not see what stands in below
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor  # noqa: F401

    for name in HPSV3_NEEDS:
        sys.modules[name] = StandIn(name)
    from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT

    words = hpsv3_words()
    tokenizer = save_qwen_tokenizer(folder)
    image_id, reward_id = (tokenizer.convert_tokens_to_ids(token) for token in ("<|image_pad|>", "<|Reward|>"))
    config = Qwen2VLConfig(**QWEN_SMALL, image_token_id=image_id, pad_token_id=0)
    model = Qwen2VLRewardModelBT(config, output_dim=2, special_token_ids=[reward_id], rm_head_type="ranknet")
    randomise(model)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "HPSv3.safetensors")
    vision = {**QWEN_SMALL["vision_config"]}
    text = {k: v for k, v in QWEN_SMALL.items() if k != "vision_config"}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen2_vl", "text_config": text, "vision_config": vision})
    )
    processor = Qwen2VLImageProcessor(min_pixels=256 * 28 * 28, max_pixels=256 * 28 * 28)
    pixels, scores = [], []
    for path in paths:
        seen = processor(Image.open(path), return_tensors="pt")
        pixels.append(seen.pixel_values)
        texts = [chat(words.format(text_prompt=prompt), len(seen.pixel_values) // 4) for prompt in PROMPTS]
        ids = [tokenizer(one, return_tensors="pt").input_ids for one in texts]
        scores.append([model(input_ids=one, **seen, return_dict=True)["logits"][0, 0] for one in ids])
    return {"patches": torch.cat(pixels), "scores": torch.tensor(scores)}


def hpsv3_words() -> str:
    """HPSv3's question, from the package itself."""
    from hpsv3.dataset.data_collator_qwen import INSTRUCTION, prompt_with_special_token

    return INSTRUCTION + prompt_with_special_token


def chat(question: str, num_tokens: int) -> str:
    """A question on a picture as Qwen2-VL's chat template renders it."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"{'<|image_pad|>' * num_tokens}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def save_qwen_tokenizer(folder: Path):
    """Qwen's tokenizer with no words, only bytes, and the special tokens of Qwen2-VL and HPSv3."""
    from transformers import Qwen2Tokenizer
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(bytes_to_unicode().values())}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "Reward")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    tokenizer.save_pretrained(folder)
    return tokenizer


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
    rewards = {"hpsv2": hpsv2_scores, "image_reward": image_reward_scores}
    for name, score in {**rewards, **({} if args.size == "full" else {"hpsv3": hpsv3_scores})}.items():
        folder = args.work_dir / name
        folder.mkdir(exist_ok=True)
        torch.save(score(folder, paths, args.size == "full"), folder / "official.bin")
    packages = ("torch", "torchvision", "transformers", "pillow", "hpsv2", "image-reward", "hpsv3", "timm")
    record = {"pictures": [path.name for path in paths], "prompts": PROMPTS, "size": args.size}
    record["versions"] = {name: version(name) for name in packages}
    (args.work_dir / "official.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
