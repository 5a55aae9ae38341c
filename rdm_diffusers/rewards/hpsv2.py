"""HPSv2 (Wu et al., arXiv 2306.09341): human preference by a CLIP ViT-H-14, versions 2.0 and 2.1."""

from __future__ import annotations

import html

import torch

from .clip import VIT_H_TOKENIZER, ClipReward, clip_tokenizer, load_clip, vit_h_config
from .preprocessing import Preprocessing
from .weights import hub_file

SOURCE = "xswu/HPSv2"
STRAIGHT_QUOTES = str.maketrans("\u2018\u2019\u201b\u201c\u201d\u201f", "'''\"\"\"")
FILES = {"hpsv2.0": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}


class HpsV2(ClipReward):
    """The cosine of the two embeddings, without a scale, as `hpsv2.score` gives it; about 0.2 to 0.4.

    Preprocessing as the `hpsv2` package's (`image_transform` with `resize_longest_max`): *longer* side to 224, bicubic
    on floats and so without clamping, padded with black to a square, CLIP's mean and standard deviation. Square
    pictures are only resized. The package antialiases with torchvision 0.17 and later, as is done here; with older ones
    it did not.
    """

    def cleaned(self, prompt: str) -> str:
        """A prompt with HTML's names as characters and with straight quotes, as open_clip's tokenizer reads it.

        What else it mends, with the package ftfy, is left as it is: text in a wrong encoding, ligatures, wide letters.
        """
        return html.unescape(html.unescape(prompt)).translate(STRAIGHT_QUOTES)


def load_v2_0(path: str | None, dtype: torch.dtype) -> HpsV2:
    """HPSv2.0; see `load_v2_1`."""
    return _load("hpsv2.0", path, dtype)


def load_v2_1(path: str | None, dtype: torch.dtype) -> HpsV2:
    """HPSv2.1 from the Hub's published file, or from that file or a folder of transformers' on this machine.

    Raises:
        ValueError: one sentence on what is missing or wrong.
    """
    return _load("hpsv2.1", path, dtype)


def _load(name: str, path: str | None, dtype: torch.dtype) -> HpsV2:
    place = path or hub_file(name, SOURCE, FILES[name])
    model, found = load_clip(name, place, dtype, [FILES[name]], vit_h_config())
    tokenizer = clip_tokenizer(name, model, found if path else None, VIT_H_TOKENIZER)
    preprocessing = Preprocessing(model.config.vision_config.image_size, fit="pad", clamps=False)
    return HpsV2(name, model, tokenizer, preprocessing)
