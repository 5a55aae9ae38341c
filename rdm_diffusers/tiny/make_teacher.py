"""Rebuilds the embedded tiny teacher from nothing: `python -m rdm_diffusers.tiny.make_teacher --output_dir teacher`.

Four stages, each seeded and each leaving its result in the output folder, so that an interrupted build resumes where
it stopped: the classifier, the autoencoder, the text encoder with the U-Net, and the reference statistics.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import TINY_NAME
from .captions import DRAWINGS
from .classifier import DrawingClassifier, load_classifier
from .handwriting import IMAGE_SIZE, Handwriting
from .reference import write_reference
from .tokenizer import MAX_TOKENS, make_tokenizer

SEED = 0
TEXT_DIM = 64
CAPTION_DROPOUT = 0.1
LATENT_POOL = 40_000


def minimise(loss_of: Callable[[int], Tensor], parameters: list, steps: int, lr: float, name: str) -> Iterator[int]:
    """AdamW on `loss_of(step)` with a short warm-up and a cosine decay; yields after each step."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    started, running = time.time(), 0.0
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 500 == 0 or step == steps - 1:
            print(f"{name} {step + 1}/{steps} loss {running:.4f} {time.time() - started:.0f} s", flush=True)
        yield step


def train_denoiser(loss_of: Callable[[int], Tensor], parameters: list, steps: int, lr: float, decay: float) -> None:
    """As `minimise`, and leaves the parameters' moving average in them."""
    ema = EMAModel(parameters, decay=decay)
    for _ in minimise(loss_of, parameters, steps, lr, "denoiser"):
        ema.step(parameters)
    ema.copy_to(parameters)


def roughen(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blurs and adds noise to half of the images, so that the classifier also reads imperfect drawings."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noisy = blurred + 0.05 * torch.randn(images.shape, generator=generator)
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, noisy, images)


def make_classifier(steps: int) -> DrawingClassifier:
    """Trains the feature net on all scans but every tenth, and prints its accuracy on those."""
    generator = torch.Generator().manual_seed(SEED)
    handwriting = Handwriting(generator)
    every = torch.arange(len(handwriting.scans))
    train, test = every[every % 10 != 0], every[every % 10 == 0]
    classifier = DrawingClassifier()

    def random_batch(scans: Tensor) -> tuple[Tensor, Tensor]:
        drawings = handwriting.random_drawings(len(scans), held_out=True)
        labels = torch.tensor([[d.digit, d.ink, d.background] for d in drawings])
        labels[:, 0] = handwriting.labels[scans]
        return handwriting.draw(drawings, scans), labels

    def loss_of(step: int) -> Tensor:
        images, labels = random_batch(train[torch.randint(len(train), (128,), generator=generator)])
        logits = classifier(roughen(images, generator))
        return torch.stack([F.cross_entropy(logits[head], labels[:, i]) for i, head in enumerate(logits)]).sum()

    for _ in minimise(loss_of, list(classifier.parameters()), steps, 2e-3, "classifier"):
        pass
    images, labels = random_batch(test.repeat(10))
    logits = classifier.eval()(images)
    accuracy = {head: (logits[head].argmax(-1) == labels[:, i]).float().mean() for i, head in enumerate(logits)}
    print("classifier on scans it never saw:", {head: f"{value:.4f}" for head, value in accuracy.items()})
    return classifier


def make_vae(steps: int) -> AutoencoderKL:
    """Trains an autoencoder with latents `[4, 8, 8]` and sets its scaling factor to give them unit variance."""
    generator = torch.Generator().manual_seed(SEED + 1)
    handwriting = Handwriting(generator)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )

    def loss_of(step: int) -> Tensor:
        images = handwriting.draw(handwriting.random_drawings(64, held_out=True)) * 2 - 1
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(reconstruction, images) + F.mse_loss(reconstruction, images) + 1e-3 * kl

    for _ in minimise(loss_of, list(vae.parameters()), steps, 2e-3, "autoencoder"):
        pass
    with torch.no_grad():
        images = handwriting.draw(handwriting.random_drawings(1024)) * 2 - 1
        vae.register_to_config(scaling_factor=1 / vae.encode(images).latent_dist.mode().std().item())
    return vae


def make_denoiser(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, steps: int
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Trains the U-Net and the text encoder together with the epsilon loss; returns their moving averages."""
    generator = torch.Generator().manual_seed(SEED + 2)
    text_encoder, unet = CLIPTextModel(text_config(tokenizer)), UNet2DConditionModel(**UNET)
    latents, drawings = encode_pool(vae, generator)
    tokens = tokenize(tokenizer, [drawing.caption for drawing in DRAWINGS] + [""])
    schedule = noise_scheduler()

    def loss_of(step: int) -> Tensor:
        x0, captions, noise = draw_batch(latents, drawings, generator)
        timesteps = torch.randint(1000, (len(x0),), generator=generator)
        noisy = schedule.add_noise(x0, noise, timesteps)
        text = text_encoder(tokens[captions])[0]
        return F.mse_loss(unet(noisy, timesteps, text).sample, noise)

    train_denoiser(loss_of, [*unet.parameters(), *text_encoder.parameters()], steps, 1e-3, 0.9995)
    return unet, text_encoder


UNET = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(64, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=TEXT_DIM,
    attention_head_dim=4,
    norm_num_groups=8,
)


def text_config(tokenizer: CLIPTokenizer, dim: int = TEXT_DIM) -> CLIPTextConfig:
    """A two-layer CLIP text encoder of width `dim` over the tokenizer's vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=2 * dim,
        projection_dim=dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def noise_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions -> token ids `[B, 12]`, padded as `StableDiffusionPipeline` pads them."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws and encodes the training pool: scaled latents `[N, 4, 8, 8]`, drawing indices `[N]`, none held out."""
    handwriting = Handwriting(generator)
    index = {drawing: i for i, drawing in enumerate(DRAWINGS)}
    latents, indices = [], []
    for _ in range(LATENT_POOL // 500):
        drawings = handwriting.random_drawings(500)
        posterior = vae.encode(handwriting.draw(drawings) * 2 - 1).latent_dist
        latents.append(posterior.mode() * vae.config.scaling_factor)
        indices += [index[drawing] for drawing in drawings]
    return torch.cat(latents), torch.tensor(indices)


def draw_batch(latents: Tensor, drawings: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """64 of the pool's latents, the indices of their captions, some dropped for the empty one behind all, and noise."""
    batch = torch.randint(len(latents), (64,), generator=generator)
    dropped = torch.rand(len(batch), generator=generator) < CAPTION_DROPOUT
    captions = torch.where(dropped, len(DRAWINGS), drawings[batch])
    return latents[batch], captions, torch.randn(latents[batch].shape, generator=generator)


def make_teacher(folder: Path, steps: dict[str, int]) -> None:
    """Runs the stages whose results `folder` lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "classifier.safetensors").exists():
        torch.manual_seed(SEED)
        save_file(make_classifier(steps["classifier"]).state_dict(), folder / "classifier.safetensors")
    pipeline_folder = folder / "teacher"
    if not (pipeline_folder / "vae").exists():
        torch.manual_seed(SEED + 1)
        make_vae(steps["autoencoder"]).save_pretrained(pipeline_folder / "vae")
    if not (pipeline_folder / "model_index.json").exists():
        torch.manual_seed(SEED + 2)
        vae = AutoencoderKL.from_pretrained(pipeline_folder / "vae")
        vae.register_to_config(_name_or_path="vae")  # not this machine's path
        tokenizer = make_tokenizer()
        unet, text_encoder = make_denoiser(vae, tokenizer, steps["denoiser"])
        StableDiffusionPipeline(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=noise_scheduler(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(pipeline_folder)  # fmt: skip
    write_reference(folder, TINY_NAME, load_classifier(folder))


def parse_steps(description: str | None, **defaults: int) -> tuple[Path, dict[str, int]]:
    """The output folder and the steps of each stage, from a command line with `--output_dir` and `--STAGE_steps`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to build in; finished stages are kept")
    for stage, steps in defaults.items():
        parser.add_argument(f"--{stage}_steps", type=int, default=steps)
    args = parser.parse_args()
    return args.output_dir, {stage: getattr(args, f"{stage}_steps") for stage in defaults}


def main() -> None:
    make_teacher(*parse_steps(__doc__, classifier=3000, autoencoder=2500, denoiser=18_000))


if __name__ == "__main__":
    main()
