"""What differs between teachers: the protocol that every family implements."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from ..sizes import Resolution, height_and_width, in_words, nearest
from .conditioning import Conditioning, PromptOptions

# File names: of every student, of a LoRA, of a whole pipeline, and of a model card.
STUDENT_CONFIG = "rdm_config.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
INDEX = "model_index.json"
CARD = "README.md"
BLOCKS = ("transformer_blocks", "single_transformer_blocks", "layers")  # diffusers' names of what transformers repeat


def on_white(images: Tensor) -> Tensor:
    """Images in [0, 1] `[B, 3, H, W]` of those with an alpha channel, `[B, 4, H, W]`; others stay. Gradients flow."""
    return images if images.shape[1] == 3 else images[:, :3] * images[:, 3:] + (1 - images[:, 3:])


@torch.no_grad()
def raw_latents(vae: ModelMixin, images: Tensor) -> Tensor:
    """What an autoencoder makes of images in [0, 1], float32, before it is scaled; of distributions their modes."""
    encoded = vae.encode(images.to(vae.device, vae.dtype) * 2 - 1)
    return (encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()).float()


def rebuilt(pipeline_class: type[DiffusionPipeline], pipeline: DiffusionPipeline, **replaced) -> DiffusionPipeline:
    """A pipeline of this class with `pipeline`'s components and settings, except those replaced by name."""
    _, names = pipeline._get_signature_keys(pipeline)
    settings = {name: pipeline.config[name] for name in names if name in pipeline.config}
    return pipeline_class(**{**pipeline.components, **replaced}, **settings)


class Family(ABC):
    """One kind of teacher.

    Attributes:
        pipeline_class: the stock diffusers pipeline.
        denoiser_name: the pipeline's component that is distilled, `unet` or `transformer`.
        time_embedding_name: the denoiser's module whose output `[B, ..., D]` carries the time to its layers.
        lora_target_modules: the layers that a student's LoRA adapts by default.
        load_options: extra arguments for `from_pretrained`.
        prompt_tokens: how many tokens of a prompt the large text encoder reads by default, as in the stock pipeline;
            0 if their number is fixed.
        most_prompt_tokens: the most that it can read, if the stock pipeline sets a limit.
        extra_encoder_tokens: about how many more tokens the large text encoder reads than the denoiser gets, for
            example of a standing instruction; negative if another encoder's tokens are appended.
        has_lora: whether the stock pipeline loads LoRAs; if not, students are full ones.
        has_tiny_vae: whether the stock pipeline decodes with an `AutoencoderTiny` in its autoencoder's place.
        stock_multiple: pixels of which each side must be a multiple for the stock pipeline, with any autoencoder.
        mixes_prompts: whether a sample of the stock pipeline depends on the lengths of the other prompts in its call.
        bins_resolutions: whether the stock pipeline rounds to the nearest of its own resolutions by default.
        comfyui_shift: the ComfyUI node that undoes the teacher's shift of times; a student's usual grid is even.
        comfyui_keys: how a LoRA names its weights for ComfyUI: as kohya's tools do, with diffusers' or with Stability's
            paths (`kohya`, `stability`), as diffusers does, as ComfyUI does, with a joint matrix of queries, keys and
            values (`joint`), or None if ComfyUI cannot read one.
        architecture_name: the network's name in ModelSpec, or else among its users.
        kohya_base_version: kohya's name for the base model, if tools look for it.
    """

    pipeline_class: type[DiffusionPipeline]
    denoiser_name: str
    time_embedding_name: str
    lora_target_modules: tuple[str, ...]
    load_options: dict[str, Any] = {}
    prompt_tokens: int = 0
    most_prompt_tokens: int | None = None
    extra_encoder_tokens: int = 0
    has_lora: bool = True
    has_tiny_vae: bool = True
    stock_multiple: int = 1
    mixes_prompts: bool = False
    bins_resolutions: bool = False
    comfyui_shift: str | None = None
    comfyui_keys: Literal["kohya", "stability", "diffusers", "joint"] | None = None
    architecture_name: str = ""
    kohya_base_version: str | None = None

    @property
    def default_guidance_scale(self) -> float:
        """The guidance that the stock pipeline uses by default."""
        parameters = signature(self.pipeline_class.__call__).parameters
        defaults = [parameters[name].default for name in ("guidance_scale", "true_cfg_scale") if name in parameters]
        return float(next(value for value in defaults if value is not None))

    @property
    def default_num_steps(self) -> int:
        """The number of steps that the stock pipeline takes by default."""
        return int(signature(self.pipeline_class.__call__).parameters["num_inference_steps"].default)

    def denoiser(self, pipeline: DiffusionPipeline) -> ModelMixin:
        """The network that is distilled."""
        return getattr(pipeline, self.denoiser_name)

    def middle_block(self, denoiser: ModelMixin) -> nn.Module:
        """The denoiser's block whose features a discriminator reads: a U-Net's bottleneck, a transformer's middle."""
        if hasattr(denoiser, "mid_block"):
            return denoiser.get_submodule("mid_block")
        blocks = [block for name in BLOCKS for block in getattr(denoiser, name, ())]
        return blocks[(len(blocks) - 1) // 2]

    def checkpoint(self, denoiser: ModelMixin, run: Callable[..., Any] | None = None) -> None:
        """Turns the denoiser's gradient checkpointing on.

        Args:
            denoiser: changed in place.
            run: calls a block with its inputs so that it is recomputed; by default diffusers' own.
        """
        denoiser.enable_gradient_checkpointing(run)

    def guided(self, guidance_scale: float) -> dict[str, Any]:
        """Arguments of the stock pipeline for guidance w in u + w (c - u); at most 1 is off."""
        return {"guidance_scale": guidance_scale}

    def unguided(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, Any]:
        """Arguments of the stock pipeline for a student: guidance off, or the value that is its denoiser's input."""
        return {"guidance_scale": 0.0}

    def guide(self, unconditional: Tensor, conditional: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """The guided output u + w (c - u), without and with the prompt `[B, C, H, W]`; w may be `[B, 1, 1, 1]`."""
        return unconditional + guidance_scale * (conditional - unconditional)

    def blank_components(self) -> dict[str, Any]:
        """What the stock pipeline's constructor needs in place of components that are not networks; mostly nothing."""
        return {}

    def embeds_guidance(self, pipeline: DiffusionPipeline) -> bool:
        """Whether the denoiser is guidance-distilled: it gets its guidance as an input, and is called once a step."""
        return False

    def prediction_type(self, scheduler: SchedulerMixin) -> str:
        """What the denoiser predicts, one of `prediction.PREDICTION_TYPES`."""
        return scheduler.config.get("prediction_type", "flow_prediction")

    def dynamic_shift(self, settings: Mapping[str, Any], length: int, num_steps: int) -> float:
        """The stock pipeline's `mu`, which shifts the times of a scheduler with `use_dynamic_shifting`.

        Args:
            settings: the scheduler's.
            length: `schedule_length` of an image's latents.
            num_steps: of the teacher.
        """
        usual = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        return float(calculate_shift(length, *(settings.get(name, value) for name, value in usual.items())))

    def architecture(self, text_width: int | None, prediction_type: str) -> str:
        """The network's name in the header of a LoRA file.

        Args:
            text_width: of the prompt embeddings that its cross-attention reads; None if it is not adapted.
            prediction_type: one of `prediction.PREDICTION_TYPES`.
        """
        return self.architecture_name

    def call_options(self, options: PromptOptions) -> dict[str, Any]:
        """Arguments of the stock pipeline that read prompts and size images as `options` say."""
        if options.resolution is None:
            return options.length
        height, width = height_and_width(options.resolution)
        exact = {"use_resolution_binning": False} if self.bins_resolutions else {}
        return {**options.length, "height": height, "width": width, **exact}

    def tokens(self, options: PromptOptions) -> int:
        """How many tokens of a prompt the large text encoder reads."""
        return options.max_sequence_length or self.prompt_tokens

    def check_options(self, options: PromptOptions) -> None:
        """Refuses a prompt length that the stock pipeline does not support. Raises ValueError."""
        length, name, most = options.max_sequence_length, self.pipeline_class.__name__, self.most_prompt_tokens
        if length is not None and "max_sequence_length" not in signature(self.pipeline_class.__call__).parameters:
            raise ValueError(f"A {name} reads a fixed number of tokens; leave --max_sequence_length {length} out.")
        if length is not None and most is not None and length > most:
            raise ValueError(f"--max_sequence_length is {length}; a {name} reads at most {most} tokens.")

    @abstractmethod
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        """B prompts -> conditioning of length B, on the text encoders' device. No gradients.

        The tensors have the same shapes for all prompts, so that conditionings can be joined.
        """

    def encode_nothing(self, pipeline: DiffusionPipeline, options: PromptOptions) -> Conditioning:
        """What guidance steers away from when no negative prompt is given: of length 1. No gradients."""
        return self.encode_prompts(pipeline, [""], options)

    def at_size(self, pipeline: DiffusionPipeline, conditioning: Conditioning, resolution: Resolution) -> Conditioning:
        """The same prompts for pictures of another size; most denoisers read it from the latents alone."""
        return conditioning

    def unconditional(self, nothing: Conditioning, conditioning: Conditioning) -> Conditioning:
        """The empty prompt, of length 1, for each of these prompts: of their length, and for pictures of their size."""
        return nothing.expand(len(conditioning))

    @abstractmethod
    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        """The shapes of one prompt's tensors, from the networks' configurations alone."""

    def calls(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning, step: Tensor | None
    ) -> Sequence[tuple[Any, ...]]:
        """These samples, of a batch, as one call of `denoise` or several, if some would disturb each other.

        Args:
            x_t, t, conditioning: as of `denoise`.
            step: the student's step of each sample `[B]`, if the network reads it.
        """
        return [(x_t, t, conditioning, step)]

    @abstractmethod
    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Calls the denoiser on x_t `[B, C, H, W]` at times `[B]`; its raw output `[B, C, H, W]`.

        Gradients flow to x_t and the denoiser's parameters.
        """

    def latent_shape(self, pipeline: DiffusionPipeline, resolution: Resolution | None) -> tuple[int, int, int]:
        """`(C, H, W)` of the latents of images of this size, by default the teacher's own.

        Raises:
            ValueError: naming the nearest size, if the teacher does not draw this one.
        """
        config, factor = self.denoiser(pipeline).config, pipeline.vae_scale_factor
        patch = config.get("patch_size", 1)  # U-Nets have none
        return self.latents_of(pipeline, config.in_channels, resolution or config.sample_size * factor, patch)

    def latents_of(
        self, pipeline: DiffusionPipeline, channels: int, resolution: Resolution, patch: int
    ) -> tuple[int, int, int]:
        """`latent_shape` for a denoiser of so many channels that reads patches of `patch` x `patch`."""
        height, width = height_and_width(resolution)
        factor, most = pipeline.vae_scale_factor, self.largest_side(pipeline)
        multiple = math.lcm(factor * patch, self.stock_multiple)
        too_long = most is not None and max(height, width) > most
        if too_long or height % multiple or width % multiple:
            why = f"it knows no places beyond {most}" if too_long else f"each side must be a multiple of {multiple}"
            raise ValueError(
                f"This teacher draws no pictures of {in_words(resolution)} pixels, because {why}; the nearest size is "
                f"{nearest(resolution, multiple, most)}."
            )
        return channels, height // factor, width // factor

    def largest_side(self, pipeline: DiffusionPipeline) -> int | None:
        """The longest side in pixels for which the denoiser has positions; None if it computes them for any size."""
        return None

    def schedule_length(self, channels: int, height: int, width: int) -> int:
        """The length by which the stock pipeline shifts times, if it shifts them by the size of latents `[C, H, W]`."""
        return height * width // 4  # most networks read patches of 2 x 2

    @abstractmethod
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """Latents `[B, C, H, W]` -> images `[B, 3, H', W']` in [0, 1], float32. Gradients flow to the latents."""

    def encode(self, pipeline: DiffusionPipeline, images: Tensor) -> Tensor:
        """The inverse of `decode`: images `[B, 3, H', W']` in [0, 1] -> latents `[B, C, H, W]`, float32. No gradients.

        They are the modes of the autoencoder's distributions, if it has any, so nothing is random.
        """
        config = pipeline.vae.config
        return (raw_latents(pipeline.vae, images) - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    @abstractmethod
    def stock_scheduler(
        self,
        teacher_scheduler: SchedulerMixin,
        num_student_steps: int,
        eta: float = 1.0,
        grid: Sequence[float] = (),
    ) -> SchedulerMixin:
        """A scheduler of diffusers itself whose saved configuration samples the student without further arguments.

        Args:
            teacher_scheduler: any scheduler with the teacher's noise schedule.
            num_student_steps: K.
            eta: the student's stochasticity, 1 or 0; stock schedulers support nothing in between.
            grid: timesteps, or sigmas of flow, that the pipeline's call will name, as `timesteps` or `sigmas`; by
                default it names none, and the scheduler lays the even grid.
        """
