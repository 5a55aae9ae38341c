"""A loaded teacher, and how its prompts are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from ..prediction import NoiseSchedule
from ..tiny import MAX_SEQUENCE_LENGTHS
from .base import Family
from .conditioning import Conditioning, PromptOptions
from .loras import Lora, LoraLayers
from .single_file import SingleFile

DEFAULT_OPTIONS = PromptOptions()


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher: the stock pipeline, frozen, with its family.

    Args:
        pipeline: the stock pipeline.
        family: how it is used.
        name: the folder, single file, Hub id or embedded teacher's name that it was loaded by.
        options: how prompts are read, by teacher and student alike.
        vae: the folder or Hub id of the autoencoder, if it is not the teacher's own.
        loras: those that are in its weights.
        lora_layers: what they added to the denoiser.
        file: the single file that its weights are from, if they are.
        file_parts: the components that are in it.
    """

    pipeline: DiffusionPipeline
    family: Family
    name: str
    options: PromptOptions = DEFAULT_OPTIONS
    vae: str | None = None
    loras: Sequence[Lora] = ()
    lora_layers: LoraLayers = field(default_factory=dict, compare=False)
    file: SingleFile | None = None
    file_parts: Sequence[str] = ()

    @property
    def denoiser(self) -> ModelMixin:
        """The network that is distilled."""
        return self.family.denoiser(self.pipeline)

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        """The networks that read prompts."""
        return list(self._text_encoders.values())

    @property
    def _text_encoders(self) -> dict[str, torch.nn.Module]:
        components = self.pipeline.components.items()
        return {name: part for name, part in components if name.startswith("text_encoder") and part is not None}

    def drop_text_encoders(self) -> None:
        """Takes the text encoders out of the pipeline, which frees their memory; no more prompts can be encoded."""
        self.pipeline.register_modules(**dict.fromkeys(self._text_encoders))

    @property
    def schedule(self) -> NoiseSchedule:
        """The teacher's noise schedule."""
        return schedule_of(self.family, self.pipeline.scheduler)

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts, one of `prediction.PREDICTION_TYPES`."""
        return self.family.prediction_type(self.pipeline.scheduler)

    @property
    def call_options(self) -> dict[str, Any]:
        """Arguments with which the stock pipeline reads prompts as `encode_prompts` does."""
        return self.family.call_options(self.options)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> conditioning of length B, on the text encoders' device. No gradients."""
        return self.family.encode_prompts(self.pipeline, prompts, self.options)

    def encode_nothing(self) -> Conditioning:
        """What guidance steers away from, of length 1. No gradients."""
        return self.family.encode_nothing(self.pipeline, self.options)


def options_for(name_or_path: str, options: PromptOptions) -> PromptOptions:
    """The options, by default with the number of tokens that an embedded teacher was trained with."""
    length = options.max_sequence_length or MAX_SEQUENCE_LENGTHS.get(name_or_path)
    return replace(options, max_sequence_length=length)


def schedule_of(family: Family, scheduler: SchedulerMixin) -> NoiseSchedule:
    """The noise schedule of a family's teacher with this scheduler."""
    if family.prediction_type(scheduler) == "flow_prediction":  # some flow schedulers have betas, too
        return NoiseSchedule(None, scheduler.config.num_train_timesteps)
    return NoiseSchedule.from_scheduler(scheduler)
