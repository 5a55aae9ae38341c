"""Rewards that read CLIP's embeddings: CLIP score, PickScore, HPSv2 and LAION's aesthetic predictor."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from .clip import load_clip, vit_h_config
from .preprocessing import Preprocessing, as_float
from .pretrained import PretrainedReward, ScoringHead
from .weights import hub_file, load_head, load_tokenizer, published_file, read_tensors

VIT_L, VIT_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE, HPSV2 = "yuvalkirstain/PickScore_v1", "xswu/HPSv2"
STRAIGHT_QUOTES = str.maketrans("\u2018\u2019\u201b\u201c\u201d\u201f", "'''\"\"\"")
# TRL's copy of the file that github.com/christophschuhmann/improved-aesthetic-predictor publishes
AESTHETIC, AESTHETIC_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
AESTHETIC_FILES = ("aesthetic.safetensors", AESTHETIC_FILE, "sac+logos+ava1-l14-linearMSE.pth")


class ClipReward(PretrainedReward):
    """Judges by the angle between a picture's and a prompt's CLIP embedding; a subclass says on what scale.

    Args:
        name: what logs call it.
        model: with both projections.
        tokenizer: prompts are cut off at the model's length.
        preprocessing: of the pictures.
    """

    def __init__(self, name: str, model: CLIPModel, tokenizer: CLIPTokenizer, preprocessing: Preprocessing) -> None:
        super().__init__(name)
        self.model, self.tokenizer, self.preprocessing = model, tokenizer, preprocessing

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] and B prompts -> `[B]`. Gradients flow to the images."""
        pixels = self.preprocessing(images).to(self.dtype)
        return self.scaled((embed_images(self.model, pixels) * self.embed_prompts(prompts)).sum(-1))

    def scaled(self, cosine: Tensor) -> Tensor:
        """Cosines `[B]` on the reward's own scale."""
        return cosine

    def cleaned(self, prompt: str) -> str:
        """A prompt as the tokenizer is to read it."""
        return prompt

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> unit vectors `[B, D]`; equal prompts are read once. No gradients."""
        unique = list(dict.fromkeys(prompts))
        cleaned = [self.cleaned(prompt) for prompt in unique]
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(cleaned, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        pooled = self.model.text_model(input_ids=ids.input_ids.to(self.device)).pooler_output
        embeddings = F.normalize(as_float(self.model.text_projection(pooled)), dim=-1)
        return embeddings[[unique.index(prompt) for prompt in prompts]]


class ClipScore(ClipReward):
    """CLIP score (Hessel et al., arXiv 2104.08718), how well picture and prompt match: 100 times the cosine.

    torchmetrics cuts negative ones off at 0; this does not, because a picture at 0 would get no gradient to leave it.
    Preprocessing as transformers' `CLIPImageProcessor`: shorter side to the model's size, bicubic, middle, CLIP's mean
    and standard deviation.
    """

    def scaled(self, cosine: Tensor) -> Tensor:
        """Cosines `[B]` -> -100 to 100; real pictures lie at about 15 to 35."""
        return 100 * cosine


class PickScore(ClipReward):
    """PickScore (Kirstain et al., arXiv 2305.01569): the cosine times the model's own scale, as on its model card.

    A difference of d between two pictures of a prompt says that the first is preferred with probability sigmoid(d).
    Preprocessing as the processor of CLIP ViT-H-14 that its card names, which is that of `ClipScore`.
    """

    def scaled(self, cosine: Tensor) -> Tensor:
        """Cosines `[B]` -> about 17 to 24 for generated pictures; the published scale is about 100."""
        return self.model.logit_scale.exp().to(cosine.dtype) * cosine


class HpsV2(ClipReward):
    """HPSv2 (Wu et al., arXiv 2306.09341): the cosine as `hpsv2.score` gives it, about 0.2 to 0.4.

    Preprocessing as the `hpsv2` package's (`image_transform` with `resize_longest_max`): *longer* side to 224, bicubic
    on floats and so without clamping, padded with black to a square, CLIP's mean and standard deviation. Square
    pictures are only resized. The package antialiases with torchvision 0.17 and later, as is done here; with older ones
    it did not.
    """

    def cleaned(self, prompt: str) -> str:
        """A prompt with HTML's names as characters and with straight quotes, as open_clip's tokenizer reads it.

        What else it fixes, with the package ftfy, is left as it is: text in a wrong encoding, ligatures, wide letters.
        """
        return html.unescape(html.unescape(prompt)).translate(STRAIGHT_QUOTES)


class Aesthetic(PretrainedReward):
    """LAION's aesthetic predictor 2: a linear judgement of the picture's embedding, 1 to 10; prompts do not matter.

    Preprocessing as OpenAI's `clip` package: that of `ClipScore`, with the middle rounded as torchvision does.

    Args:
        model: CLIP ViT-L/14; its text tower is not used.
        head: judges the embedding.
    """

    def __init__(self, model: CLIPModel, head: ScoringHead) -> None:
        super().__init__("aesthetic")
        self.model, self.head = model, head
        self.preprocessing = Preprocessing(model.config.vision_config.image_size, rounds_up=True)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] -> `[B]`. Gradients flow to the images."""
        return self.head(embed_images(self.model, self.preprocessing(images).to(self.dtype)))


def embed_images(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Preprocessed pictures `[B, 3, S, S]` -> unit vectors `[B, D]`, float32 at least. Gradients flow to the pixels."""
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    return F.normalize(as_float(model.visual_projection(pooled)), dim=-1)


def load_clip_score(path: str | None, dtype: torch.dtype) -> ClipReward:
    """The score by OpenAI's ViT-L/14, or by the CLIP in a folder or Hub repository that transformers can load."""
    return _load(ClipScore, "clip_score", path or VIT_L, None, dtype)


def load_pickscore(path: str | None, dtype: torch.dtype) -> ClipReward:
    """PickScore v1 from the Hub, or from a folder or Hub repository that transformers can load."""
    return _load(PickScore, "pickscore", path or PICKSCORE, VIT_H, dtype)


def load_hpsv2_0(path: str | None, dtype: torch.dtype) -> ClipReward:
    """HPSv2.0; see `load_hpsv2_1`."""
    return _load_hpsv2("hpsv2.0", "HPS_v2_compressed.pt", path, dtype)


def load_hpsv2_1(path: str | None, dtype: torch.dtype) -> ClipReward:
    """HPSv2.1 from the Hub's published file, or from that file or a folder of transformers' on this machine."""
    return _load_hpsv2("hpsv2.1", "HPS_v2.1_compressed.pt", path, dtype)


def load_aesthetic(path: str | None, dtype: torch.dtype) -> Aesthetic:
    """The published head, float32, on OpenAI's ViT-L/14.

    `path` is None for both from the Hub; a file of the head, or a folder that holds one of `AESTHETIC_FILES`. A folder
    `clip` beside the file is the CLIP model, which otherwise comes from the Hub.
    """
    file = published_file("aesthetic", path, AESTHETIC, AESTHETIC_FILE, AESTHETIC_FILES)
    tensors = read_tensors("aesthetic", file)  # first, because it is small
    beside = file.parent / "clip"
    model, _ = load_clip("aesthetic", beside if beside.is_dir() else VIT_L, dtype)
    head = ScoringHead(model.config.projection_dim)
    load_head("aesthetic", file, head, tensors)
    return Aesthetic(model, head)


def _load_hpsv2(name: str, file: str, path: str | None, dtype: torch.dtype) -> ClipReward:
    place, clip = path or hub_file(name, HPSV2, file), {"files": [file], "config": vit_h_config()}
    return _load(HpsV2, name, place, VIT_H, dtype, clip, fit="pad", clamps=False)


def _load(
    kind: type[ClipReward], name: str, place: str | Path, tokenizer: str | None, dtype: torch.dtype,
    clip: dict[str, Any] | None = None, **preprocessing: Any,
) -> ClipReward:  # fmt: skip
    """A reward of this kind; `tokenizer` is the Hub id of its tokenizer, by default the weights' own."""
    model, found = load_clip(name, place, dtype, **(clip or {}))
    default = tokenizer or (VIT_L if found else str(place))
    words = load_tokenizer(name, CLIPTokenizer, found, default, model.config.text_config.vocab_size)
    return kind(name, model, words, Preprocessing(model.config.vision_config.image_size, **preprocessing))
