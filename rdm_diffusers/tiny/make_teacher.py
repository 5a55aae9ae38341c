"""Rebuilds the embedded tiny teacher from nothing: `python -m rdm_diffusers.tiny.make_teacher --output_dir teacher`.

There are four seeded stages: the classifier, the autoencoder, the text encoder with the U-Net, and the reference
statistics. Each leaves its result in the output folder, so that an interrupted build continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
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
from .captions import CAPTIONS, DRAWINGS, make_tokenizer
from .classifier import DrawingClassifier, load_classifier
from .handwriting import IMAGE_SIZE, Handwriting
from .reference import REFERENCES, write_reference

SEED = 0
TEXT_DIM = 64
CAPTION_DROPOUT = 0.1
LATENT_POOL = 40_000
VAE = dict(
    sample_size=IMAGE_SIZE, latent_channels=4, block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    mid_block_add_attention=False,
)  # fmt: skip
UNET = dict(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=(64, 64), layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=TEXT_DIM, attention_head_dim=4,
)  # fmt: skip
NOISE = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
    steps_offset=1,
)  # fmt: skip


def minimise(
    loss_of: Callable[[], Tensor], parameters: list, steps: int, lr: float, name: str, ema_decay: float | None = None
) -> None:
    """AdamW with a short warm-up and a cosine decay; with `ema_decay`, the parameters end as their moving average."""
    ema = None if ema_decay is None else EMAModel(parameters, decay=ema_decay)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    started, running = time.time(), 0.0
    for step in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if ema is not None:
            ema.step(parameters)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 500 == 0 or step == steps - 1:
            print(f"{name} {step + 1}/{steps} loss {running:.4f} {time.time() - started:.0f} s", flush=True)
    if ema is not None:
        ema.copy_to(parameters)


def roughen(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blurs and adds noise to half of the images, so that the classifier also reads imperfect drawings."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noisy = blurred + 0.05 * torch.randn(images.shape, generator=generator)
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, noisy, images)


def make_classifier(steps: int) -> DrawingClassifier:
    """Trains the feature network on nine tenths of the scans, and prints its accuracy on the others."""
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

    def loss_of() -> Tensor:
        images, labels = random_batch(train[torch.randint(len(train), (128,), generator=generator)])
        logits = classifier(roughen(images, generator))
        return torch.stack([F.cross_entropy(logits[head], labels[:, i]) for i, head in enumerate(logits)]).sum()

    minimise(loss_of, list(classifier.parameters()), steps, 2e-3, "classifier")
    images, labels = random_batch(test.repeat(10))
    logits = classifier.eval()(images)
    accuracy = {head: (logits[head].argmax(-1) == labels[:, i]).float().mean() for i, head in enumerate(logits)}
    print("classifier on scans it never saw:", {head: f"{value:.4f}" for head, value in accuracy.items()})
    return classifier


def make_vae(steps: int) -> AutoencoderKL:
    """Trains an autoencoder with latents `[4, 8, 8]` and sets its scaling factor to give them unit variance."""
    generator = torch.Generator().manual_seed(SEED + 1)
    handwriting = Handwriting(generator)
    vae = AutoencoderKL(**VAE)

    def loss_of() -> Tensor:
        images = handwriting.draw(handwriting.random_drawings(64, held_out=True)) * 2 - 1
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(reconstruction, images) + F.mse_loss(reconstruction, images) + 1e-3 * kl

    minimise(loss_of, list(vae.parameters()), steps, 2e-3, "autoencoder")
    with torch.no_grad():
        images = handwriting.draw(handwriting.random_drawings(1024)) * 2 - 1
        vae.register_to_config(scaling_factor=1 / vae.encode(images).latent_dist.mode().std().item())
    return vae


def text_config(tokenizer: CLIPTokenizer, dim: int = TEXT_DIM, layers: int = 2) -> CLIPTextConfig:
    """A CLIP text encoder of width `dim` over the tokenizer's vocabulary."""
    return CLIPTextConfig(
        hidden_size=dim, intermediate_size=2 * dim, projection_dim=dim, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str] = CAPTIONS) -> Tensor:
    """Token ids `[N + 1, L]` of N captions and the empty one, padded as `StableDiffusionPipeline` pads them."""
    return tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def _encode_pool(vae: AutoencoderKL, generator: torch.Generator) -> tuple[Tensor, Tensor]:
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


def train_denoiser(
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], vae: AutoencoderKL, generator: torch.Generator,
    parameters: list, steps: int, lr: float, ema_decay: float,
) -> None:  # fmt: skip
    """As `minimise`; `loss_of` takes latents `[64, 4, 8, 8]` of drawings, rows `[64]` of `tokenize`, and noise."""
    latents, drawings = _encode_pool(vae, generator)

    def loss_of_batch() -> Tensor:
        batch = torch.randint(len(latents), (64,), generator=generator)
        dropped = torch.rand(len(batch), generator=generator) < CAPTION_DROPOUT
        captions = torch.where(dropped, len(DRAWINGS), drawings[batch])
        return loss_of(latents[batch], captions, torch.randn(latents[batch].shape, generator=generator))

    minimise(loss_of_batch, parameters, steps, lr, "denoiser", ema_decay)


def make_pipeline(vae: AutoencoderKL, steps: int) -> StableDiffusionPipeline:
    """Trains the U-Net and the text encoder together with the epsilon loss; their moving averages are in the result."""
    generator, tokenizer = torch.Generator().manual_seed(SEED + 2), make_tokenizer()
    text_encoder, unet = CLIPTextModel(text_config(tokenizer)), UNet2DConditionModel(**UNET)
    tokens, schedule = tokenize(tokenizer), DDIMScheduler(**NOISE)

    def loss_of(x0: Tensor, captions: Tensor, noise: Tensor) -> Tensor:
        timesteps = torch.randint(1000, (len(x0),), generator=generator)
        noisy = schedule.add_noise(x0, noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, text_encoder(tokens[captions])[0]).sample, noise)

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    train_denoiser(loss_of, vae, generator, parameters, steps, 1e-3, 0.9995)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=schedule,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


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
        make_pipeline(vae, steps["denoiser"]).save_pretrained(pipeline_folder)
    write_reference(folder, TINY_NAME, load_classifier(folder))


def remove_paths(folder: Path) -> None:
    """Removes the paths of this machine from a pipeline's configurations."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def parse_steps(description: str | None, **defaults: int) -> tuple[Path, dict[str, int]]:
    """The output folder and the steps of each stage, from a command line with `--output_dir` and `--STAGE_steps`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to build in; finished stages are kept")
    for stage, steps in defaults.items():
        parser.add_argument(f"--{stage}_steps", type=int, default=steps)
    args = parser.parse_args()
    return args.output_dir, {stage: getattr(args, f"{stage}_steps") for stage in defaults}


def rebuild(name: str, description: str | None, default_steps: int, make: Callable[[int, Path], None]) -> None:
    """The command of a teacher that `make(steps, folder)` writes, measured with the first teacher's classifier."""
    folder, steps = parse_steps(description, denoiser=default_steps)
    teacher = folder / REFERENCES[name].teacher_folder
    if not (teacher / "model_index.json").exists():
        make(steps["denoiser"], teacher)
    write_reference(folder, name, load_classifier())


if __name__ == "__main__":
    make_teacher(*parse_steps(__doc__, classifier=3000, autoencoder=2500, denoiser=18_000))
