"""How well a picture shows the text that its prompt quotes, as RapidOCR reads it on the CPU. A black box.

The models are PaddleOCR's PP-OCRv4 (Chinese and English) in ONNX, inside the package `rapidocr-onnxruntime`. Scoring
written text by an edit distance is the OCR reward of Flow-GRPO (arXiv 2505.05470), which also takes a text that stands
somewhere in what was read as right; here the nearest passage counts, and a prompt may quote several texts.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Quotation marks: straight and typographic ones, double and single. An apostrophe inside a word is none.
QUOTED = re.compile(
    r"""
    "([^"]*)" | “([^”]*)” | „([^“”]*)[“”] | «([^»]*)» | 「([^」]*)」
    | (?<!\w)'(.*?)'(?!\w) | (?<!\w)\u2018(.*?)\u2019(?!\w)
    """,
    re.VERBOSE,
)


class TextReward:
    """1 minus the normalised edit distance of the text that a prompt quotes from what is read in the picture.

    Reading takes no notice of the other pictures of a batch.

    Raises:
        ImportError: without the package, naming the extra.
    """

    name, differentiable = "ocr", False

    def __init__(self) -> None:
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise ImportError(
                "The reward ocr reads with rapidocr-onnxruntime, which is for Python up to 3.12: pip install "
                "'rdm-diffusers[ocr]'."
            ) from error
        threads = min(torch.get_num_threads(), os.cpu_count() or 1)
        self.engine: Any = RapidOCR(intra_op_num_threads=threads, inter_op_num_threads=1)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] and B prompts -> `[B]` in [0, 1], on the CPU; NaN where nothing is quoted."""
        pictures = (images.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
        scores = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            texts = quoted_texts(prompt)
            scores.append(score(texts, self.read(picture)) if texts else math.nan)
        return torch.tensor(scores, dtype=torch.float32)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextReward:
        return self  # it holds no tensors, and its sessions cannot be copied

    def read(self, picture: Any) -> str:
        """The lines that are read in a picture, an RGB array `[H, W, 3]` of 8 bits, from top to bottom."""
        lines, _ = self.engine(picture[:, :, ::-1])  # as BGR, like the pictures of OpenCV
        return normalised(" ".join(text for _, text, _ in lines or []))


def quoted_texts(prompt: str) -> list[str]:
    """What a prompt quotes in double, single or typographic quotation marks, normalised; texts of nothing left out."""
    texts = (normalised("".join(filter(None, match.groups()))) for match in QUOTED.finditer(prompt))
    return [text for text in texts if text]


def normalised(text: str) -> str:
    """Text without spaces and case, with the usual forms of wide and joined letters (NFKC) and of apostrophes."""
    return "".join(unicodedata.normalize("NFKC", text).replace("\u2019", "'").casefold().split())


def score(texts: Sequence[str], read: str) -> float:
    """1 - sum of `passage_distance(text, read)` / sum of the texts' lengths, in [0, 1]."""
    return 1 - sum(passage_distance(text, read) for text in texts) / sum(map(len, texts))


def passage_distance(text: str, read: str) -> int:
    """The least number of letters to insert, delete or replace between a text and any passage of what was read.

    At most the text's length, which is its distance from the empty passage. (Sellers, 1980.)
    """
    above = [0] * (len(read) + 1)  # a passage may begin anywhere
    for i, letter in enumerate(text, 1):
        row = [i]
        for j, other in enumerate(read, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other)))
        above = row
    return min(above)  # and end anywhere
