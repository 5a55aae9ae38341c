"""Reward models of the published architectures, small and random, and files of weights as they are published."""

from __future__ import annotations

from pathlib import Path

import torch
from parts_families import qwen_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    Qwen2VLConfig,
    Qwen2VLModel,
)

from rdm_diffusers.rewards.hpsv3 import preference_head
from rdm_diffusers.rewards.pretrained import ScoringHead
from rdm_diffusers.tiny.captions import CAPTIONS, MAX_TOKENS, make_tokenizer

WIDTH, HEADS, LAYERS, PATCH, SIZE, JOINT = 16, 2, 2, 8, 32, 12


def clip_config() -> CLIPConfig:
    """A CLIP of two layers a tower, for the tiny teacher's captions."""
    tokenizer = make_tokenizer()
    common = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    text = dict(
        vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, hidden_act="gelu", **common,
    )  # fmt: skip
    vision = dict(image_size=SIZE, patch_size=PATCH, hidden_act="gelu", **common)
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=JOINT)


def save_clip(folder: Path, tokenizer: bool = True) -> CLIPModel:
    """A random CLIP with its tokenizer, in a folder as transformers saves it."""
    model = CLIPModel(clip_config()).eval()
    nn.init.normal_(model.vision_model.embeddings.class_embedding)
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return model


class Block(nn.Module):
    """A layer of open_clip's transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(WIDTH, 4 * WIDTH))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClipTower(nn.Module):
    """What open_clip's two towers have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block() for _ in range(LAYERS))


class OpenClipVision(OpenClipTower):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIZE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, JOINT))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(OpenClipTower):
    """open_clip's CLIP in our own words, to test the conversion: same names, same function, other code."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = OpenClipVision()
        self.token_embedding = nn.Embedding(len(make_tokenizer()), WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(MAX_TOKENS, WIDTH))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, JOINT))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def read(self, ids: Tensor, end: int) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((MAX_TOKENS, MAX_TOKENS), float("-inf")).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        last = (ids == end).int().argmax(1)
        return self.ln_final(x)[torch.arange(len(ids)), last] @ self.text_projection


def randomise(model: nn.Module) -> nn.Module:
    """All weights random, so that no two may be confused: also the biases and norms that start at 0 and 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_open_clip(folder: Path, file: str = "HPS_v2.1_compressed.pt") -> OpenClip:
    """A file as HPSv2 publishes it, with the configuration and the tokenizer of its small size beside it."""
    model = randomise(OpenClip())
    folder.mkdir(exist_ok=True)
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / file)
    clip_config().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-6), nn.LayerNorm(WIDTH, 1e-6)
        self.attn = Attention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class VisionEncoder(nn.Module):
    """BLIP's picture network in our own words, named as its authors name it."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, (SIZE // PATCH) ** 2 + 1, WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)})
        self.blocks = nn.ModuleList(VisionLayer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, 1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def blip_config() -> BlipConfig:
    """A small BLIP for the tiny teacher's captions."""
    common = dict(intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    text = BlipTextConfig(
        vocab_size=64, hidden_size=WIDTH, encoder_hidden_size=WIDTH, max_position_embeddings=40, is_decoder=True,
        pad_token_id=0, bos_token_id=2, sep_token_id=3, eos_token_id=3, **common,
    )  # fmt: skip
    vision = BlipVisionConfig(hidden_size=WIDTH, image_size=SIZE, patch_size=PATCH, layer_norm_eps=1e-6, **common)
    return BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())


def save_image_reward(folder: Path) -> tuple[VisionEncoder, BlipTextModel, ScoringHead]:
    """A file as ImageReward publishes it, with the configuration and the tokenizer of its small size beside it."""
    config = blip_config()
    vision, head = randomise(VisionEncoder()), randomise(ScoringHead(WIDTH))
    text = randomise(BlipTextModel(config.text_config, add_pooling_layer=False))
    parts = {"blip.visual_encoder.": vision, "blip.text_encoder.": text, "mlp.": head}
    tensors = {start + name: tensor for start, part in parts.items() for name, tensor in part.state_dict().items()}
    tensors |= {"blip.vision_proj.weight": torch.zeros(2, WIDTH), "blip.text_proj.bias": torch.zeros(2)}
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "ImageReward.pt")
    config.save_pretrained(folder)
    save_bert_tokenizer(folder)
    return vision, text, head


def save_bert_tokenizer(folder: Path) -> None:
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def save_aesthetic(folder: Path) -> ScoringHead:
    """A head as it is published, and the CLIP that it judges, in a folder `clip` beside it."""
    save_clip(folder / "clip")
    head = randomise(ScoringHead(JOINT))
    torch.save(head.state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return head


def qwen_config() -> Qwen2VLConfig:
    """A Qwen2-VL of two layers a tower."""
    text = dict(
        vocab_size=400, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=1, rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default"},
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = dict(depth=LAYERS, embed_dim=WIDTH, hidden_size=WIDTH, num_heads=HEADS, mlp_ratio=2)
    return Qwen2VLConfig(text_config=text, vision_config=vision)


def save_hpsv3(folder: Path) -> tuple[Qwen2VLModel, nn.Sequential]:
    """A file as HPSv3 publishes it, in the names of old transformers, with configuration and tokenizer beside it."""
    model, head = randomise(Qwen2VLModel(qwen_config())), randomise(preference_head(WIDTH))
    parts = {"visual.": model.visual, "model.": model.language_model, "rm_head.": head}
    tensors = {start + name: tensor for start, part in parts.items() for name, tensor in part.state_dict().items()}
    folder.mkdir(exist_ok=True)
    vocabulary = qwen_config().text_config.vocab_size - 20
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:vocabulary].clone()
    save_file({**tensors, "lm_head.weight": torch.zeros(1)}, folder / "HPSv3.safetensors")
    qwen_config().save_pretrained(folder)
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return model, head


def save_hpsv3_package(folder: Path) -> None:
    """As much of the package hpsv3 as is read, in other words; it would fail if it were executed."""
    (folder / "hpsv3" / "dataset").mkdir(parents=True)
    (folder / "hpsv3" / "dataset" / "data_collator_qwen.py").write_text(
        'import no_such_package\n\nINSTRUCTION = """\nRate it: {text_prompt}\n"""\n\n'
        'prompt_with_special_token = """\nRating: <|Reward|>\n\nEND\n"""\n\n\ndef judge():\n    pass\n'
    )


SAVE = {
    "hpsv2": save_open_clip,
    "hpsv3": save_hpsv3,
    "pickscore": save_clip,
    "clip_score": save_clip,
    "image_reward": save_image_reward,
    "aesthetic": save_aesthetic,
}
