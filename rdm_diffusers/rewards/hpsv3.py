"""HPSv3 (Ma et al., arXiv 2508.03789): human preference by a Qwen2-VL 7B that is asked for a rating."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLModel

from .preprocessing import as_float, normalized
from .pretrained import PretrainedReward
from .user_file import reason
from .weights import load_head, load_tokenizer, model_from_tensors, published_file, read_tensors

NAME = "hpsv3"
SOURCE, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
BASE = "Qwen/Qwen2-VL-7B-Instruct"  # its configuration and its tokenizer
REWARD_TOKEN, IMAGE_TOKEN = "<|Reward|>", "<|image_pad|>"
PIXELS = 256 * 28 * 28  # of every picture, about: its area is scaled to this
PROMPT_FILE, PROMPT_PARTS = "dataset/data_collator_qwen.py", ("INSTRUCTION", "prompt_with_special_token")


class HpsV3(PretrainedReward):
    """The mean of the preference that the head reads off the reward token, about -10 to 15; its deviation is left out.

    Preprocessing as the `hpsv3` package's: height and width to multiples of 28 of about 448 x 448 pixels, bicubic, the
    shape roughly kept, CLIP's mean and standard deviation, patches of 14 x 14. Positions are counted through, without
    Qwen's numbering of pictures by row and column, as in the package.

    Args:
        model: Qwen2-VL without its language head.
        head: embedding -> mean and deviation, float32.
        tokenizer: knows the reward token.
        question: with `{text_prompt}` where the prompt goes, and the reward token.

    Attributes:
        pixels: the area of a picture.
    """

    def __init__(
        self, model: Qwen2VLModel, head: nn.Sequential, tokenizer: PreTrainedTokenizerBase, question: str
    ) -> None:
        super().__init__(NAME, batch_size=4)
        self.model, self.head, self.tokenizer, self.question = model, head, tokenizer, question
        self.pixels = PIXELS

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] and B prompts -> `[B]`. Gradients flow to the images."""
        patches, grid = self.patches(as_float(images))
        places = torch.tensor([grid] * len(images), device=self.device)
        seen = self.model.visual(patches.to(self.dtype), grid_thw=places)
        seen = getattr(seen, "pooler_output", seen)  # transformers before 5 gives the tensor itself
        tokens = self.tokenizer(
            [self.message(prompt, len(seen) // len(images)) for prompt in prompts],
            padding=True, padding_side="right", return_tensors="pt",
        ).to(self.device)  # fmt: skip
        is_image, is_reward = (
            tokens.input_ids == self.tokenizer.convert_tokens_to_ids(token) for token in (IMAGE_TOKEN, REWARD_TOKEN)
        )
        embedded = self.model.language_model.embed_tokens(tokens.input_ids)
        read = self.model.language_model(
            inputs_embeds=embedded.masked_scatter(is_image[..., None].expand_as(embedded), seen.to(embedded.dtype)),
            attention_mask=tokens.attention_mask, use_cache=False,
        ).last_hidden_state  # fmt: skip
        last = is_reward.shape[1] - 1 - is_reward.flip(1).int().argmax(1)
        return as_float(self.head(read[torch.arange(len(last)), last].to(self.head[0].weight.dtype)))[:, 0]

    def message(self, prompt: str, num_tokens: int) -> str:
        """The whole text of a prompt whose picture is so many tokens, in Qwen's chat form."""
        prompt = prompt.replace(IMAGE_TOKEN, "").replace(REWARD_TOKEN, "")
        return (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            f"{IMAGE_TOKEN * num_tokens}<|vision_end|>{self.question.format(text_prompt=prompt)}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def patches(self, images: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Images `[B, 3, H, W]` -> patches `[B * n, 3 * t * p * p]` in Qwen's order, and the grid (1, rows, columns).

        Gradients flow to the images.
        """
        vision = self.model.config.vision_config
        size, merged, times = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        height, width = fitting_size((images.shape[-2], images.shape[-1]), size * merged, self.pixels)
        resized = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        rows, columns = height // size, width // size
        cells = normalized(resized).reshape(
            len(images), 3, rows // merged, merged, size, columns // merged, merged, size
        )
        ordered = cells.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]  # a still picture is its own film
        return ordered.expand(*(-1,) * 6, times, -1, -1).reshape(-1, 3 * times * size * size), (1, rows, columns)


def fitting_size(size: tuple[int, int], factor: int, pixels: int) -> tuple[int, int]:
    """Height and width as multiples of the factor, with about so many pixels: Qwen's `smart_resize` with one bound."""
    if max(size) > 200 * min(size):
        raise ValueError(f"A picture of {size[0]} x {size[1]} pixels is too narrow for Qwen2-VL, which bears 1 : 200.")
    height, width = (max(factor, round(side / factor) * factor) for side in size)
    if height * width == pixels:
        return height, width
    rounded = math.floor if height * width > pixels else math.ceil
    scale = math.sqrt(pixels / math.prod(size))
    height, width = (max(factor, rounded(side * scale / factor) * factor) for side in size)
    return height, width


def load(path: str | None, dtype: torch.dtype) -> HpsV3:
    """HPSv3 from the Hub or from this machine; 15 GB in bfloat16, twice that in float32. The head is float32.

    `path` is None for the Hub; the file, or a folder that holds it. The configuration and the tokenizer of Qwen2-VL are
    used if they are beside it.
    """
    question = _read_question()
    file = published_file(NAME, path, SOURCE, FILE, [FILE])
    model_tensors, head_tensors = split_tensors(read_tensors(NAME, file))
    config = _config(file, model_tensors)
    head = preference_head(config.text_config.hidden_size)
    load_head(NAME, file, head, head_tensors)
    model = model_from_tensors(NAME, Qwen2VLModel, config, model_tensors, file, dtype)
    tokenizer = load_tokenizer(NAME, AutoTokenizer, file if path else None, BASE, config.text_config.vocab_size)
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    return HpsV3(model, head, tokenizer, question)


def preference_head(width: int) -> nn.Sequential:
    """The package's `ranknet` head, embedding -> mean and deviation, its dropout an identity."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def split_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The published tensors as those of `Qwen2VLModel` and those of the head; the language head is left out.

    Both ways in which transformers has named the parts are understood, that before and that after its version 4.52.
    """
    model: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("rm_head."):
            head[name.removeprefix("rm_head.")] = tensor.float()
        elif not name.startswith("lm_head."):
            inner = name.removeprefix("model.")
            known = inner.startswith(("visual.", "language_model."))
            model[inner if known else f"language_model.{inner}"] = tensor
    return model, head


def _read_question() -> str:
    """What HPSv3 asks Qwen, from the file of the installed package `hpsv3`, which is read and not executed."""
    found = find_spec("hpsv3")
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"The reward {NAME} asks Qwen2-VL in the words of the package hpsv3; get it by pip install --no-deps hpsv3 "
            "(nothing else of it is used, and what it depends on is not needed)."
        )
    file = Path(found.submodule_search_locations[0]) / PROMPT_FILE
    try:
        texts = {
            target.id: line.value.value
            for line in ast.parse(file.read_text("utf-8")).body
            if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)
            for target in line.targets
            if isinstance(target, ast.Name) and isinstance(line.value.value, str)
        }
        return "".join(texts[part] for part in PROMPT_PARTS)
    except (OSError, SyntaxError, KeyError) as error:
        raise ValueError(
            f"The reward {NAME} finds no {' and '.join(PROMPT_PARTS)} in {file} ({reason(error)}); install hpsv3 1.0."
        ) from error


def _config(file: Path, tensors: Mapping[str, Tensor]) -> Qwen2VLConfig:
    """Qwen2-VL's configuration, for as many tokens as the weights have."""
    beside = file.parent / "config.json"
    try:
        config = Qwen2VLConfig.from_pretrained(beside if beside.is_file() else BASE)
    except Exception as error:  # of many kinds: no network, no such file, a file of another kind
        raise ValueError(
            f"The reward {NAME} needs the configuration of {BASE} ({reason(error)}); connect to the network, or put "
            "its config.json beside the weights."
        ) from error
    if "language_model.embed_tokens.weight" in tensors:
        config.text_config.vocab_size = len(tensors["language_model.embed_tokens.weight"])
    return config
