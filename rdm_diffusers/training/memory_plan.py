"""The peak of a run's device memory, from configurations alone: no weights are loaded, nothing is allocated.

The networks and what is computed with them are the run's own, on the meta device (`memory_model.py`). A run goes
through phases one after the other; each needs what stays on the device and something of its own for a while.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.models.modeling_utils import no_init_weights

from ..config import RunConfig
from ..families import Conditioning, check_kinds_of_files, check_lora, family_of, options_for, pipeline_config
from ..families.quantization import NEEDS_GPU
from ..networks import FAKE_SCORE, STUDENT, TEACHER, Networks, SeparateNetworks, SharedBase
from ..prediction import NoiseSchedule
from ..sharding import is_sharded_launch
from . import memory_model as model
from .assembly import CONTRAST_STEPS, DTYPES, lora_config, prompt_options
from .embeddings import embed_prompts
from .finish import PICTURES_AT_ONCE

GIB = 2**30
FLOAT = 4  # bytes of a float32
PROMPTS_AT_ONCE = inspect.signature(embed_prompts).parameters["batch_size"].default
SMALLEST_8BIT = 4096  # numbers; bitsandbytes keeps float32 states for smaller tensors
NOT_COUNTED = "the CUDA context (0.3 to 0.5 GiB), the allocator's fragmentation, kernels' workspaces, rewards"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device by purpose and by phase, and parameters by component; all estimated.

    Args:
        sizes: bytes by purpose; not all are needed at once.
        phases: the most bytes at any time of each phase.
        parameters: of each component, and of one LoRA (`lora`).
        lora_layers: how many layers a LoRA adapts; 0 for full students.
    """

    sizes: dict[str, int]
    phases: dict[str, int]
    parameters: dict[str, int]
    lora_layers: int

    @property
    def peak(self) -> int:
        """Bytes of the phase that needs most."""
        return max(self.phases.values())

    def as_table(self) -> str:
        """Plain text, in millions of parameters and GiB; the last line is the peak."""
        lines = [f"{name:<40}{count / 1e6:>12,.1f} M parameters" for name, count in self.parameters.items()]
        if self.lora_layers:
            lines.append(f"{'layers with a LoRA':<40}{self.lora_layers:>12,}")
        lines += ["", "what a device holds, not all of it at once (estimated)"]
        lines += [f"{name:<40}{size / GIB:>12.2f} GiB" for name, size in self.sizes.items() if size]
        lines += ["", f"the most of each phase (estimated); not counted: {NOT_COUNTED}"]
        lines += [f"{name:<40}{size / GIB:>12.2f} GiB" for name, size in self.phases.items()]
        lines += ["", f"{'peak, estimated':<40}{self.peak / GIB:>12.2f} GiB"]
        return "\n".join(lines)


def plan_memory(config: RunConfig, device_type: str = "cuda") -> MemoryPlan:
    """The plan of a run, for LoRAs or full weights as `args.student` says.

    Args:
        args: the run's arguments.
        device_type: where it will run; `cpu` differs in autocast and in what optimisers need for a moment.

    Raises:
        ValueError: as `pipeline_config`, `family_of` and `check_lora`.
    """
    planner = _Planner(config, device_type)
    sizes = planner.sizes()
    return MemoryPlan(sizes, planner.phases(sizes), planner.parameters, planner.lora_layers)


class _Planner:
    """What a run has on its device, and when; all sizes in bytes.

    The frozen networks are in the dtype that a run loads them in; of the two trained ones, which are alike, there is
    one. FSDP divides by the number of processes what it spreads.
    """

    def __init__(self, config: RunConfig, device_type: str):
        args = argparse.Namespace(**config.as_arguments(), num_processes=int(os.environ.get("WORLD_SIZE", "1")))
        args.fold_adapters = config.fold_adapters
        self.run = config
        self.args, self.device_type = args, device_type
        self.options = options_for(args.pretrained_model_name_or_path, prompt_options(config))
        self.dtype, self.is_lora = DTYPES[args.mixed_precision], args.student == "lora"
        self.autocast = None if self.is_lora or args.mixed_precision == "no" else self.dtype
        self.shards = args.num_processes if is_sharded_launch() else 1
        self.config = pipeline_config(args.pretrained_model_name_or_path, revision=args.revision)
        self.family = family_of(self.config)
        if self.is_lora:
            check_lora(self.family)
        name, without = args.pretrained_model_name_or_path, ["vae"] if args.pretrained_vae_model_name_or_path else []
        check_kinds_of_files("teacher", name, self.config, args.variant, without, revision=args.revision)
        self._load()
        self.networks = self._make_networks()
        self.trained = self.networks.parameters(STUDENT)
        self.trained_size = sum(parameter.nbytes for parameter in self.trained)

    def _load(self) -> None:
        """The teacher's networks, and their sizes before anything is added to them."""
        self.models = model.meta_models(self.args.pretrained_model_name_or_path, self.config, self.args.revision)
        self.pipeline = model.meta_pipeline(self.family, self.models)
        self.denoiser: Any = self.models[self.family.denoiser_name]
        self.encoders = [each for name, each in self.models.items() if name.startswith("text_encoder")]
        self.parameters = {name: sum(p.numel() for p in each.parameters()) for name, each in self.models.items()}
        for each in self.models.values():
            model.cast(each, self.dtype)
        self.plain_size = model.nbytes(self.denoiser)
        if self.args.quantization:
            model.quantise(self.denoiser, self.args.quantization)
        self.frozen_size = model.nbytes(self.denoiser)
        self.latents = self.family.latent_shape(self.pipeline, self.options.resolution)
        self.prompt = model.conditioning(self.family, self.pipeline, self.options, self.dtype)

    def _make_networks(self) -> Networks:
        """The roles. Any noise schedule does; one without a table works on the meta device."""
        told = self.family.embeds_guidance(self.pipeline)
        scale = 1.0 if told else self.args.guidance_scale
        common: dict[str, Any] = dict(
            family=self.family, schedule=NoiseSchedule(None, 1000), prediction_type="flow_prediction",
            null_conditioning=self.prompt, guidance_scale=scale,
        )  # fmt: skip
        trained = self.denoiser if self.is_lora else self._trained_network()
        if self.args.gradient_checkpointing:
            model.checkpoint_blocks(trained, self.autocast, self.device_type)
        if not self.is_lora:
            return SeparateNetworks({STUDENT: trained, FAKE_SCORE: trained, TEACHER: self.denoiser}, **common)
        config = lora_config(self.family, self.run.student)
        config.init_lora_weights = False  # there is nothing to fill
        with no_init_weights():
            networks = SharedBase(trained, config, fold_adapters=self.args.fold_adapters, **common)
        self.parameters["lora"] = sum(parameter.numel() for parameter in networks.parameters(STUDENT))
        return networks

    def _trained_network(self) -> Any:
        name, component = self.args.pretrained_model_name_or_path, self.family.denoiser_name
        alone = model.meta_models(name, {component: self.config[component]}, self.args.revision)
        return alone[component].requires_grad_(True)

    @property
    def lora_layers(self) -> int:
        """How many layers a LoRA adapts."""
        return len(self.networks.layers) if isinstance(self.networks, SharedBase) else 0

    # --- sizes by purpose -----------------------------------------------------------------------------------------

    def sizes(self) -> dict[str, int]:
        """All that a device holds at some time."""
        args, shards = self.args, self.shards
        whole = not self.is_lora and args.quantization
        samples = args.train_batch_size
        kept, update = self._update_peak()
        shown = self._shown()
        return {
            f"{self.family.denoiser_name}, frozen": self.frozen_size // (1 if whole else shards),
            "two LoRAs" if self.is_lora else "student and fake score": self._roles() // shards,
            "two optimisers": 2 * sum(self._states(parameter.numel()) for parameter in self.trained) // shards,
            "the student's moving average": self.trained_size // shards if args.use_ema else 0,
            "folded copies of adapted weights": 2 * self._folded(),
            "blocks gathered from all processes": self._gathered() if shards > 1 else 0,
            "a group's rollouts": self._rollouts(),
            "gradients of one role": self.trained_size // shards if self._has_gradients else 0,
            f"activations of {samples} samples": kept,
            "forward and backward, at most": update,
            "teacher, at most": self._teacher_peak(samples),
            "optimiser's step, at most": self._step_peak() // shards,
            "text encoders": model.nbytes(*self.encoders),
            f"reading {PROMPTS_AT_ONCE} prompts, at most": self._reading_peak(PROMPTS_AT_ONCE),
            "autoencoder": model.nbytes(self.pipeline.vae),
            "decoding a picture, at most": self._decoding_peak(1),
            f"drawing {shown} pictures at the end, at most": max(self._teacher_peak(shown), self._decoding_peak(shown)),
        }

    @property
    def _has_gradients(self) -> bool:
        """Whether a role has all its gradients while a batch goes through it; else they come as activations go."""
        return self.args.gradient_accumulation_steps > 1 or self.shards > 1

    def _roles(self) -> int:
        """Both trained roles; full networks have buffers, too."""
        return 2 * (self.trained_size if self.is_lora else model.nbytes(self.networks.modules[0]))

    def _states(self, numbers: int) -> int:
        """AdamW's two states of a tensor; in 8 bits with two float32 for 256 numbers."""
        if self.args.use_8bit_adam and numbers >= SMALLEST_8BIT:
            return 2 * numbers + 2 * FLOAT * (numbers // 256 + 1)
        return 2 * FLOAT * numbers

    def _folded(self) -> int:
        """One role's adapted weights, which are kept with the adapter that they were made of."""
        if not isinstance(self.networks, SharedBase) or not self.args.fold_adapters:
            return 0
        layers = self.networks.layers.values()
        return sum(layer.get_base_layer().weight.nbytes for layer in layers) + self.trained_size

    def _gathered(self) -> int:
        """What is whole for a moment: all outside of blocks, the block at work and its gradients, the next block."""
        network = self.networks.modules[0]
        kinds: Any = network._no_split_modules or ()
        blocks = [f"{name}." for name, each in network.named_modules() if type(each).__name__ in kinds]
        own: Counter[str] = Counter()
        for name, parameter in network.named_parameters():
            own[max((block for block in blocks if name.startswith(block)), key=len, default="")] += parameter.nbytes
        outside, largest = own.pop("", 0), max(own.values(), default=0)
        return outside + (2 if self.is_lora else 3) * largest

    def _rollouts(self) -> int:
        """States, predictions and noises of an update's samples, and their prompts, about."""
        args, latent = self.args, FLOAT * math.prod(self.latents)
        samples = args.train_batch_size * args.gradient_accumulation_steps
        prompt = sum(tensor.nbytes for tensor in self.prompt.tensors.values())
        return samples * ((4 * args.num_student_steps + 8 + 6 * args.num_renoisings) * latent + 3 * prompt)

    def _update_peak(self) -> tuple[int, int]:
        """What a batch's forward keeps for its backward, and the most that both need."""
        inputs = self._inputs(self.args.train_batch_size)
        return model.update_peak(self.networks, inputs, self._has_gradients, self.autocast, self.device_type)

    def _inputs(self, batch: int) -> tuple:
        return torch.empty(batch, *self.latents, device="meta"), torch.empty(batch, device="meta"), self._prompts(batch)

    def _prompts(self, batch: int) -> Conditioning:
        return self.prompt[torch.zeros(batch, dtype=torch.long)]

    def _teacher_peak(self, batch: int) -> int:
        """As many times what one sample takes, as nothing is kept for a backward."""
        return batch * self._of_one[0]

    def _decoding_peak(self, batch: int) -> int:
        return batch * self._of_one[1]

    @cached_property
    def _of_one(self) -> tuple[int, int]:
        """What teacher and autoencoder need for one sample."""
        decoding = model.decoding_peak(self.family, self.pipeline, 1, self.latents)
        return model.teacher_peak(self.networks, self._inputs(1)), decoding

    def _reading_peak(self, batch: int) -> int:
        """The hungriest text encoder's."""
        tokens = self.prompt.tensors["prompt_embeds"].shape[1] + self.family.extra_encoder_tokens
        return max(model.encoding_peak(encoder, batch, tokens) for encoder in self.encoders)

    def _step_peak(self) -> int:
        """The gradients, and AdamW's square roots: on a GPU of all tensors at once, else of one at a time."""
        largest = max(parameter.nbytes for parameter in self.trained)
        at_once = self.device_type == "cuda" and not self.args.use_8bit_adam
        return self.trained_size + (self.trained_size if at_once else 2 * largest)

    # --- phases ---------------------------------------------------------------------------------------------------

    def phases(self, sizes: dict[str, int]) -> dict[str, int]:
        """The most bytes of each phase, in the order of a run."""
        args, names = self.args, list(sizes)
        rollouts, gradients = sizes["a group's rollouts"], sizes["gradients of one role"]
        stays = sum(sizes[name] for name in names[: names.index("a group's rollouts")])
        average = sizes["the student's moving average"] if args.offload else 0
        stays += (sizes["autoencoder"] if args.reward else 0) - average
        step = max(sizes["optimiser's step, at most"], average)
        return {
            "reading the prompts": self._reading(sizes),
            "the teacher's pictures": self._contrast(sizes, stays),
            "rollouts and R_dm": stays + rollouts + sizes["teacher, at most"] + self._folded(),
            "forward and backward": stays + rollouts + gradients + sizes["forward and backward, at most"],
            "optimiser's step": stays + rollouts + step,
            "validation pictures": stays + rollouts + self._validation(sizes),
            "the last pictures": self._last(sizes),
        }

    def _reading(self, sizes: dict[str, int]) -> int:
        """Nothing else is on the device then; before, a denoiser may have been quantised there."""
        quantised = self.frozen_size if self.args.quantization in NEEDS_GPU else 0
        return max(quantised, sizes["text encoders"] + sizes[f"reading {PROMPTS_AT_ONCE} prompts, at most"])

    def _contrast(self, sizes: dict[str, int], stays: int) -> int:
        """Before the optimisers have any states; the whole way of the pictures is kept."""
        if self.args.monitor_images == 0:
            return 0
        way = self._way(self.args.monitor_images, CONTRAST_STEPS)
        return stays - sizes["two optimisers"] + way + sizes["teacher, at most"]

    def _way(self, pictures: int, steps: int) -> int:
        """A rollout's three tensors a step, and the four that they are stacked into."""
        return 7 * steps * pictures * FLOAT * math.prod(self.latents)

    def _validation(self, sizes: dict[str, int]) -> int:
        """The autoencoder, unless it is there for rewards, one picture in it, and all the pictures, twice."""
        count, side = self.args.num_validation_images, self.latents[-1] * self.pipeline.vae_scale_factor
        pictures = 2 * FLOAT * count * 3 * side**2
        drawn = sizes["decoding a picture, at most"] + pictures
        there = 0 if self.args.reward else sizes["autoencoder"]
        return there + drawn + self._way(count, self.args.num_student_steps)

    def _last(self, sizes: dict[str, int]) -> int:
        """Teacher and student as stock pipelines, which share all but the denoiser."""
        student = self.frozen_size if self.is_lora else self.plain_size
        shown = self._shown()
        reading, teacher, decoding = self._reading_peak(shown), self._teacher_peak(shown), self._decoding_peak(shown)
        if not self.args.offload:
            there = self.frozen_size + student + sizes["text encoders"] + sizes["autoencoder"]
            return there + max(reading, teacher, decoding)
        alone = [model.nbytes(encoder) + reading for encoder in self.encoders]
        return max(max(self.frozen_size, student) + teacher, sizes["autoencoder"] + decoding, *alone)

    def _shown(self) -> int:
        """Pictures of samples.png that are drawn at once."""
        return min(self.args.num_validation_images, self.args.train_batch_size, PICTURES_AT_ONCE)
