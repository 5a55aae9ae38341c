"""What differs between teachers: the protocol that every family file fills in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import Tensor

# Files that every student has, or every LoRA of one.
STUDENT_CONFIG = "rdm_config.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
# Files that models have, students among them: of whole pipelines, and the card.
INDEX = "model_index.json"
CARD = "README.md"


@dataclass(frozen=True)
class Conditioning:
    """What a family's denoiser needs besides x_t and t: named tensors, each `[B, ...]` along the same batch."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        """The chosen samples, as a `Conditioning`."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand(self, batch: int) -> Conditioning:
        """A conditioning of length 1, repeated `batch` times without copying."""
        return Conditioning({name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """On another device, with the floating-point tensors in `dtype`."""
        return Conditioning(
            {
                name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
                for name, tensor in self.tensors.items()
            }
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Joined along the batch; all parts must name the same tensors."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class PromptOptions:
    """How prompts are read, by teacher and student alike.

    Args:
        max_sequence_length: tokens that the large text encoder reads, where there is one; by default as many as the
            stock pipeline.
        resolution: pixels per side; by default the teacher's own.
        embedded_guidance: the guidance that a guidance-distilled denoiser is told, for families that have one.
    """

    max_sequence_length: int | None = None
    resolution: int | None = None
    embedded_guidance: float | None = None

    @property
    def length(self) -> dict[str, int]:
        """`max_sequence_length` as an argument of the stock pipeline, where it is given."""
        return {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}


def square_latents(channels: int, resolution: int, factor: int, patch: int = 1) -> tuple[int, int, int]:
    """`(C, H, W)` of the latents of square images, for a denoiser that reads patches of `patch` x `patch`.

    Raises:
        ValueError: if the resolution does not make whole patches.
    """
    if resolution % (factor * patch):
        raise ValueError(f"--resolution is {resolution}; this teacher needs a multiple of {factor * patch}.")
    return channels, resolution // factor, resolution // factor


def rebuilt(pipeline_class: type[DiffusionPipeline], pipeline: DiffusionPipeline, **replaced) -> DiffusionPipeline:
    """A pipeline of a class that shares `pipeline`'s components and settings, but for those replaced by name."""
    _, settings = pipeline._get_signature_keys(pipeline)
    kept = {name: pipeline.config[name] for name in settings if name in pipeline.config}
    return pipeline_class(**{**pipeline.components, **replaced}, **kept)


def encoding_device(pipeline: DiffusionPipeline) -> torch.device:
    """Where a pipeline's text encoders are, which may be elsewhere than its other networks."""
    return next(pipeline.text_encoder.parameters()).device


class Family(ABC):
    """One kind of teacher.

    Attributes:
        pipeline_class: the stock diffusers pipeline.
        denoiser_name: the pipeline's component that is distilled, `unet` or `transformer`.
        time_embedding_name: the denoiser's module whose output `[B, D]` tells its layers the time.
        lora_target_modules: where a student's LoRA goes by default.
        load_options: what `from_pretrained` is told beyond the usual.
        longest_prompt: how many tokens the stock pipeline reads at most, where it can be told a number and has a limit.
        has_lora: whether the stock pipeline loads LoRAs; without, students are full ones.
        bins_resolutions: whether the stock pipeline draws at the nearest of its own resolutions, unless told not to.
        comfyui_shift: what in ComfyUI undoes the teacher's shift of times, which the student's even grid has not.
        comfyui_keys: how a LoRA names its weights for ComfyUI: as kohya's tools do, with diffusers' or with Stability's
            paths (`kohya`, `stability`), as diffusers does, or None where ComfyUI reads none.
        architecture_name: what ModelSpec, or else its users, call the network.
    """

    pipeline_class: type[DiffusionPipeline]
    denoiser_name: str
    time_embedding_name: str
    lora_target_modules: tuple[str, ...]
    load_options: dict[str, Any] = {}
    longest_prompt: int | None = None
    has_lora: bool = True
    bins_resolutions: bool = False
    comfyui_shift: str | None = None
    comfyui_keys: Literal["kohya", "stability", "diffusers"] | None = None
    architecture_name: str = ""

    def denoiser(self, pipeline: DiffusionPipeline) -> ModelMixin:
        """The network that is distilled."""
        return getattr(pipeline, self.denoiser_name)

    def guided(self, guidance_scale: float) -> dict[str, Any]:
        """What the stock pipeline is called with for the teacher's guidance w in u + w (c - u); at most 1 is off."""
        return {"guidance_scale": guidance_scale}

    def unguided(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, Any]:
        """What the stock pipeline is called with for a student: guidance off, or the value that is told to it."""
        return {"guidance_scale": 0.0}

    def guide(self, unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
        """The teacher's guided output u + w (c - u), of its outputs without and with the prompt `[B, C, H, W]`."""
        return unconditional + guidance_scale * (conditional - unconditional)

    def embeds_guidance(self, pipeline: DiffusionPipeline) -> bool:
        """Whether the denoiser is guidance-distilled: told its guidance as a number, and called once a step."""
        return False

    def prediction_type(self, scheduler: SchedulerMixin) -> str:
        """What the denoiser's output means, one of `prediction.PREDICTION_TYPES`."""
        return scheduler.config.get("prediction_type", "flow_prediction")

    def architecture(self, text_width: int | None, prediction_type: str) -> str:
        """What the header of a LoRA's file calls the network.

        Args:
            text_width: of the prompt embeddings that its cross-attention reads; None where it is not adapted.
            prediction_type: one of `prediction.PREDICTION_TYPES`.
        """
        return self.architecture_name

    def reading(self, options: PromptOptions) -> dict[str, Any]:
        """What the stock pipeline is called with to read prompts and size pictures as the options say."""
        if options.resolution is None:
            return options.length
        whole = {"use_resolution_binning": False} if self.bins_resolutions else {}
        return {**options.length, "height": options.resolution, "width": options.resolution, **whole}

    def check_options(self, options: PromptOptions) -> None:
        """Refuses a length of prompts that the stock pipeline cannot be told.

        Raises:
            ValueError: saying how many tokens it can be told to read.
        """
        length, name = options.max_sequence_length, self.pipeline_class.__name__
        if length is not None and "max_sequence_length" not in signature(self.pipeline_class.__call__).parameters:
            raise ValueError(f"A {name} reads a fixed number of tokens; leave --max_sequence_length {length} out.")
        if length is not None and self.longest_prompt is not None and length > self.longest_prompt:
            raise ValueError(f"--max_sequence_length is {length}; a {name} reads at most {self.longest_prompt} tokens.")

    @abstractmethod
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], options: PromptOptions
    ) -> Conditioning:
        """Prompts (length B) -> conditioning of length B, on the pipeline's device. No gradients.

        Whatever the prompts, the tensors have the same shapes, so that conditionings can be joined.

        Args:
            pipeline: the teacher's.
            prompts: B texts.
            options: how they are read.
        """

    def encode_nothing(self, pipeline: DiffusionPipeline, options: PromptOptions) -> Conditioning:
        """What the stock pipeline guides away from where no negative prompt is given: of length 1. No gradients."""
        return self.encode_prompts(pipeline, [""], options)

    @abstractmethod
    def conditioning_shapes(self, pipeline: DiffusionPipeline, options: PromptOptions) -> dict[str, tuple[int, ...]]:
        """The shapes of one prompt's tensors, from the networks' configurations alone."""

    @abstractmethod
    def denoise(self, denoiser: Callable[..., tuple], x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Calls the denoiser on x_t `[B, C, H, W]` at times `[B]`; its raw output `[B, C, H, W]`.

        Gradients flow to x_t and the denoiser's parameters.
        """

    @abstractmethod
    def latent_shape(self, pipeline: DiffusionPipeline, resolution: int | None) -> tuple[int, int, int]:
        """`(C, H, W)` of the latents of square images of `resolution` pixels, by default the teacher's own.

        Raises:
            ValueError: if the resolution is not a multiple of the autoencoder's factor.
        """

    @abstractmethod
    def decode(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """Latents `[B, C, H, W]` -> images `[B, 3, H', W']` in [0, 1], float32. Gradients flow to the latents."""

    @abstractmethod
    def stock_scheduler(
        self, teacher_scheduler: SchedulerMixin, num_student_steps: int, eta: float = 1.0
    ) -> SchedulerMixin:
        """A scheduler of diffusers itself whose saved configuration samples the student, with no call-time argument.

        Args:
            teacher_scheduler: any scheduler with the teacher's noise schedule.
            num_student_steps: K.
            eta: the student's stochasticity, 1 or 0; stock schedulers know nothing in between.
        """
