"""ImageReward v1.0 (Xu et al., arXiv 2304.05977): human preference by BLIP, the prompt reading the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from .preprocessing import Preprocessing
from .pretrained import PretrainedReward, ScoringHead
from .weights import load_head, load_tokenizer, model_from_tensors, published_file, read_tensors

NAME = "image_reward"
SOURCE, FILE = "THUDM/ImageReward", "ImageReward.pt"
FILES = ("ImageReward.safetensors", FILE)
TOKENIZER = "bert-base-uncased"
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the scores of its training pictures

# What BLIP's own code calls parts of a vision layer -> what transformers does
VISION_NAMES = {
    "visual_encoder.cls_token": "embeddings.class_embedding",
    "visual_encoder.pos_embed": "embeddings.position_embedding",
    "visual_encoder.patch_embed.proj.": "embeddings.patch_embedding.",
    "visual_encoder.norm.": "post_layernorm.",
    "visual_encoder.blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}
POSITIONS = "blip.text_encoder.embeddings.position_ids"  # a constant that old versions saved


class ImageReward(PretrainedReward):
    """The head's judgement of the prompt's first token, which attended to the picture; standardised, about -2 to 2.

    Preprocessing as the `ImageReward` package: shorter side to 224, bicubic, middle (rounded as torchvision does),
    CLIP's mean and standard deviation. Prompts are cut off at 35 tokens.

    Args:
        vision: BLIP's ViT-L/16.
        text: BLIP's BERT with cross attention, used in both directions.
        head: judges what the text model says.
        tokenizer: of BERT, uncased.
    """

    def __init__(
        self, vision: BlipVisionModel, text: BlipTextModel, head: ScoringHead, tokenizer: BertTokenizer
    ) -> None:
        super().__init__(NAME)
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        self.preprocessing = Preprocessing(vision.config.image_size, rounds_up=True)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] and B prompts -> `[B]`. Gradients flow to the images."""
        seen = self.vision(pixel_values=self.preprocessing(images).to(self.dtype)).last_hidden_state
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        read = self.text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
        return (self.head(read.last_hidden_state[:, 0]) - MEAN) / STD


def load(path: str | None, dtype: torch.dtype) -> ImageReward:
    """The published file from the Hub or from this machine; the head is float32.

    `path` is None for the Hub; the file, or a folder that holds one of `FILES`. A `config.json` beside it, of
    transformers' `BlipConfig`, stands for another size; a tokenizer beside it is used.
    """
    file = published_file(NAME, path, SOURCE, FILE, FILES)
    beside = file.parent / "config.json"
    config = BlipConfig.from_pretrained(beside) if beside.is_file() else blip_config()
    vision_tensors, text_tensors, head_tensors = split_tensors(read_tensors(NAME, file))
    head = ScoringHead(config.text_config.hidden_size)
    load_head(NAME, file, head, head_tensors)
    vision = model_from_tensors(NAME, BlipVisionModel, config.vision_config, vision_tensors, file, dtype)
    text = model_from_tensors(
        NAME, BlipTextModel, config.text_config, text_tensors, file, dtype, add_pooling_layer=False
    )
    place = file if path else None
    tokenizer = load_tokenizer(NAME, BertTokenizer, place, TOKENIZER, config.text_config.vocab_size)
    return ImageReward(vision, text, head, tokenizer)


def blip_config() -> BlipConfig:
    """ViT-L/16 at 224 and BERT base with cross attention, as in the package's `med_config.json`."""
    vision = BlipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
        patch_size=16, layer_norm_eps=1e-6,
    )  # fmt: skip
    text = BlipTextConfig(
        vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=512, layer_norm_eps=1e-12, is_decoder=True,
    )  # fmt: skip
    return BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())


def split_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The published file's tensors as those of the vision model, the text model and the head.

    What else BLIP has (projections for its own training) is left out; what is no part of BLIP stays with the head's,
    for an error to name it.
    """
    vision: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("blip.visual_encoder."):
            renamed = name.removeprefix("blip.")
            for old, new in VISION_NAMES.items():
                renamed = renamed.replace(old, new)
            vision[renamed] = tensor
        elif name.startswith("blip.text_encoder.") and name != POSITIONS:
            text[name.removeprefix("blip.text_encoder.")] = tensor
        elif not name.startswith("blip."):
            head[name.removeprefix("mlp.")] = tensor
    return vision, text, head
