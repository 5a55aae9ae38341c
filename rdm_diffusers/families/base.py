"""What differs between teachers: the protocol that every family implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import Tensor

# File names: of every student, of a LoRA, of a whole pipeline, and of a model card.
STUDENT_CONFIG = "rdm_config.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
INDEX = "model_index.json"
CARD = "README.md"


@dataclass(frozen=True)
class Conditioning:
    """What a family's denoiser needs besides x_t and t: named tensors, each `[B, ...]` along the same batch."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        """The selected samples, as a `Conditioning`."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand(self, batch: int) -> Conditioning:
        """A conditioning of length 1, repeated `batch` times without copying."""
        return Conditioning({name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """On another device, with the floating-point tensors in `dtype`."""
        dtypes = {name: dtype if each.is_floating_point() else each.dtype for name, each in self.tensors.items()}
        return Conditioning({name: each.to(device, dtypes[name]) for name, each in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Joined along the batch; all parts must name the same tensors."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class PromptOptions:
    """How prompts are read, by teacher and student alike.

    Args:
        max_sequence_length: tokens that the large text encoder reads, if there is one; by default the family's
            `prompt_tokens`.
        resolution: pixels per side; by default the teacher's own.
        embedded_guidance: the guidance that a guidance-distilled denoiser gets as an input.
    """

    max_sequence_length: int | None = None
    resolution: int | None = None
    embedded_guidance: float | None = None

    @property
    def length(self) -> dict[str, int]:
        """`max_sequence_length` as an argument of the stock pipeline, if it is set."""
        return {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}


def square_latents(channels: int, resolution: int, factor: int, patch: int = 1) -> tuple[int, int, int]:
    """`(C, H, W)` of the latents of square images, for a denoiser that reads patches of `patch` x `patch`.

    Raises:
        ValueError: if the resolution does not make whole patches.
    """
    if resolution % (factor * patch):
        raise ValueError(f"--resolution is {resolution}; this teacher needs a multiple of {factor * patch}.")
    return channels, resolution // factor, resolution // factor


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


def encoding_device(pipeline: DiffusionPipeline) -> torch.device:
    """The device of a pipeline's text encoders, which may differ from that of its other networks."""
    return next(pipeline.text_encoder.parameters()).device


class Family(ABC):
    """One kind of teacher.

    Attributes:
        pipeline_class: the stock diffusers pipeline.
        denoiser_name: the pipeline's component that is distilled, `unet` or `transformer`.
        time_embedding_name: the denoiser's module whose output `[B, D]` carries the time to its layers.
        lora_target_modules: the layers that a student's LoRA adapts by default.
        load_options: extra arguments for `from_pretrained`.
        prompt_tokens: how many tokens of a prompt the large text encoder reads by default, as in the stock pipeline;
            0 if their number is fixed.
        most_prompt_tokens: the most that it can read, if the stock pipeline sets a limit.
        extra_encoder_tokens: about how many more tokens the large text encoder reads than the denoiser gets, for
            example of a standing instruction; negative if another encoder's tokens are appended.
        has_lora: whether the stock pipeline loads LoRAs; if not, students are full ones.
        has_tiny_vae: whether the stock pipeline decodes with an `AutoencoderTiny` in its autoencoder's place.
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

    def denoiser(self, pipeline: DiffusionPipeline) -> ModelMixin:
        """The network that is distilled."""
        return getattr(pipeline, self.denoiser_name)

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
        exact = {"use_resolution_binning": False} if self.bins_resolutions else {}
        return {**options.length, "height": options.resolution, "width": options.resolution, **exact}

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

    def latent_shape(self, pipeline: DiffusionPipeline, resolution: int | None) -> tuple[int, int, int]:
        """`(C, H, W)` of the latents of square images of `resolution` pixels, by default the teacher's own.

        Raises:
            ValueError: if the resolution does not make whole latents or patches.
        """
        config, factor = self.denoiser(pipeline).config, pipeline.vae_scale_factor
        patch = config.get("patch_size", 1)  # U-Nets have none
        return square_latents(config.in_channels, resolution or config.sample_size * factor, factor, patch)

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
