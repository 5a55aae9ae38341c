"""Rebuilds the embedded teacher of scenes: `python -m rdm_diffusers.tiny.make_scenes_teacher --output_dir scenes`.

It is a Stable Diffusion 3 pipeline. There are five seeded stages: the autoencoder, the text encoders, the transformer,
the classifier and the reference statistics. Each leaves its result in the output folder. The transformer's training, by
far the longest, saves its state every few minutes, from which the same command continues exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import TINY_SCENES_NAME
from .caption_reader import TEXT_DIMS, CaptionReader
from .captions import make_tokenizer
from .make_flow_teacher import encode_text
from .make_teacher import CAPTION_DROPOUT, SEED, minimise, parse_steps, remove_paths, roughen, tokenize
from .reference import REFERENCES, write_reference
from .resumable import ResumableTraining
from .scene_classifier import SceneClassifier, labels_of, load_scene_classifier, reading_loss
from .scene_drawing import SceneDrawing
from .scenes import IMAGE_SIZE, MAX_TOKENS, SCENE_CAPTIONS

BATCH, LEARNING_RATE = 32, 7e-4
LATENT_POOL = 96_000
VAE = dict(
    sample_size=IMAGE_SIZE, latent_channels=8, block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    mid_block_add_attention=False, shift_factor=0.0,
)  # fmt: skip
TRANSFORMER = dict(
    sample_size=16, patch_size=2, in_channels=8, out_channels=8, num_layers=6, num_attention_heads=5,
    attention_head_dim=32, caption_projection_dim=160, joint_attention_dim=sum(TEXT_DIMS),
    pooled_projection_dim=sum(TEXT_DIMS), pos_embed_max_size=8,
)  # fmt: skip


def make_classifier(steps: int) -> SceneClassifier:
    """Trains the feature network on nine tenths of the scans, and prints its accuracy on the others."""
    generator = torch.Generator().manual_seed(SEED + 5)
    drawing, classifier = SceneDrawing(generator), SceneClassifier()
    unseen = torch.arange(len(drawing.scans)) % 10 == 0

    def loss_of() -> Tensor:
        scenes = drawing.random_scenes(64, held_out=True)
        images = roughen(drawing.draw(scenes, ~unseen), generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = classifier(images)
        return reading_loss({name: each.float() for name, each in logits.items()}, labels_of(scenes))

    minimise(loss_of, list(classifier.parameters()), steps, 2e-3, "classifier", 0.999)
    scenes = drawing.random_scenes(2000, held_out=True)
    right = classifier.eval().requires_grad_(False).correct(drawing.draw(scenes, unseen), scenes)
    print("classifier on scans it never saw:", {name: f"{each.float().mean():.4f}" for name, each in right.items()})
    return classifier


def make_vae(steps: int) -> AutoencoderKL:
    """Trains an autoencoder with latents `[8, 16, 16]` and sets its scaling factor to give them unit variance."""
    generator = torch.Generator().manual_seed(SEED + 6)
    drawing, vae = SceneDrawing(generator), AutoencoderKL(**VAE)

    def loss_of() -> Tensor:
        images = drawing.draw(drawing.random_scenes(16, held_out=True)) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            reconstruction = vae.decode(posterior.sample(generator)).sample.float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(reconstruction, images) + F.mse_loss(reconstruction, images) + 1e-4 * kl

    minimise(loss_of, list(vae.parameters()), steps, 2e-3, "autoencoder")
    with torch.no_grad():
        images = drawing.draw(drawing.random_scenes(512)) * 2 - 1
        vae.register_to_config(scaling_factor=1 / vae.encode(images).latent_dist.mode().std().item())
    return vae


def make_reader(steps: int) -> CaptionReader:
    """Trains the text encoders to read captions."""
    generator, tokenizer = torch.Generator().manual_seed(SEED + 7), make_tokenizer(SCENE_CAPTIONS, MAX_TOKENS)
    drawing, reader = SceneDrawing(generator), CaptionReader(tokenizer)

    def loss_of() -> Tensor:
        scenes = drawing.random_scenes(128, held_out=True)
        return reader(tokenize(tokenizer, [scene.caption for scene in scenes])[:-1], scenes)

    minimise(loss_of, list(reader.parameters()), steps, 1e-3, "text encoders")
    return reader


@torch.no_grad()
def make_pool(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The transformer's training data: scaled latents `[N, 8, 16, 16]`, float16, and tokens `[N + 1, 27]`."""
    drawing = SceneDrawing(torch.Generator().manual_seed(SEED + 8))
    latents, captions = [], []
    for _ in range(LATENT_POOL // 500):
        scenes = drawing.random_scenes(500)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(drawing.draw(scenes) * 2 - 1).latent_dist
        latents.append((posterior.mode().float() * vae.config.scaling_factor).half())
        captions += [scene.caption for scene in scenes]
    return {"latents": torch.cat(latents), "tokens": tokenize(make_tokenizer(SCENE_CAPTIONS, MAX_TOKENS), captions)}


def flow_loss(transformer: nn.Module, encoders: nn.ModuleList, pool: dict[str, Tensor]) -> Callable[[int], Tensor]:
    """The rectified-flow loss at logit-normal times (SD3, arXiv 2403.03206) as a function of the step."""

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed((SEED + 9) * 10**9 + step)
        rows = torch.randint(len(pool["latents"]), (BATCH,), generator=generator)
        x0 = pool["latents"][rows].float()
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        tokens = pool["tokens"][rows.masked_fill(dropped, len(pool["latents"]))]
        sigma = compute_density_for_timestep_sampling("logit_normal", BATCH, 0.0, 1.0, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        scale = sigma[:, None, None, None]
        noisy = (1 - scale) * x0 + scale * noise
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # the fastest on CPUs
            with torch.no_grad():
                embeds, pooled = encode_text(encoders, tokens)
            velocity = transformer(noisy, embeds, pooled, sigma * 1000, return_dict=False)[0]
        return F.mse_loss(velocity.float(), noise - x0)

    return loss_of


def assemble(vae: AutoencoderKL, encoders: nn.ModuleList, transformer: nn.Module) -> StableDiffusion3Pipeline:
    """The pipeline, in half precision."""
    tokenizer = make_tokenizer(SCENE_CAPTIONS, MAX_TOKENS)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=encoders[0],
        tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    ).to(torch.float16)  # fmt: skip


def make_transformer(folder: Path, reader: CaptionReader, steps: int) -> SD3Transformer2DModel:
    """Trains the transformer, going on from its saved state; its moving average is the result."""
    torch.manual_seed(SEED + 9)
    transformer = SD3Transformer2DModel(**TRANSFORMER)
    training = ResumableTraining(list(transformer.parameters()), folder / "training.safetensors")
    loss_of = flow_loss(transformer, reader.encoders, load_file(folder / "pool.safetensors"))
    training.run(loss_of, steps, LEARNING_RATE)
    training.copy_averages()
    return transformer


def make_scenes_teacher(folder: Path, steps: dict[str, int]) -> None:
    """Runs the stages whose results `folder` lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "vae").exists():
        torch.manual_seed(SEED + 6)
        make_vae(steps["autoencoder"]).save_pretrained(folder / "vae")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    torch.manual_seed(SEED + 7)
    if not (folder / "reader.safetensors").exists():
        save_file(make_reader(steps["reader"]).state_dict(), folder / "reader.safetensors")
    reader = CaptionReader(make_tokenizer(SCENE_CAPTIONS, MAX_TOKENS))
    reader.load_state_dict(load_file(folder / "reader.safetensors"))
    if not (folder / "pool.safetensors").exists():
        save_file(make_pool(vae), folder / "pool.safetensors")
    pipeline_folder = folder / REFERENCES[TINY_SCENES_NAME].teacher_folder
    if not pipeline_folder.exists():
        transformer = make_transformer(folder, reader, steps["denoiser"])
        assemble(vae, reader.encoders, transformer).save_pretrained(pipeline_folder)
        remove_paths(pipeline_folder)
    if not (folder / "classifier_scenes.safetensors").exists():
        torch.manual_seed(SEED + 5)
        save_file(make_classifier(steps["classifier"]).state_dict(), folder / "classifier_scenes.safetensors")
    write_reference(folder, TINY_SCENES_NAME, load_scene_classifier(folder))


if __name__ == "__main__":
    make_scenes_teacher(*parse_steps(__doc__, autoencoder=3000, reader=2000, denoiser=100_000, classifier=4000))
