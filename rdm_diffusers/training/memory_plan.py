"""The peak of a run's device memory, from the teacher's configurations: no weights are loaded or allocated.

The run's own networks compute on the meta device (`memory_model.py`). A run is a sequence of phases; each needs what
stays on the device, and temporary memory of its own.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from ..config import MemoryConfig, RunConfig
from ..config.optimizers import kinds_of
from ..config.subjects import ON_THE_FLY
from ..families import SingleFile, check_kinds_of_files, check_lora, family_of, options_for, parts_of, pipeline_config
from ..families.quantization import NEEDS_GPU
from ..networks import STUDENT, TARGET, TEACHER, Networks, SharedBase
from ..prediction import NoiseSchedule
from ..rewards import Reward
from ..sharding import is_sharded_launch
from . import memory_model as model
from .assembly import DTYPES, guidance_outside, make_networks, prompt_options
from .contrast import CONTRAST_STEPS
from .devices import prepare_vae
from .fake_score import add_to_fake_score, discriminator_size
from .finish import PICTURES_AT_ONCE
from .memory_table import FULL, LORAS, OPTIMISERS, MemoryPlan
from .pull_back_memory import peaks
from .reward_memory import measure_rewards

FLOAT = 4  # bytes of a float32
SMALLEST_8BIT = 4096  # numbers; bitsandbytes keeps float32 states for smaller tensors


def plan_memory(config: RunConfig, device_type: str = "cuda", rewards: Sequence[Reward] | None = None) -> MemoryPlan:
    """The plan of a run of LoRAs or full weights.

    A `device_type` of `cpu` differs in autocast and in the optimisers' temporary memory. The run's `rewards` count if
    they are loaded. Raises as `pipeline_config`, `family_of` and `check_lora` do.
    """
    planner = _Planner(config, device_type, rewards)
    sizes = planner.sizes()
    lora_layers = len(planner.networks.layers) if isinstance(planner.networks, SharedBase) else 0
    phases, unknown = planner.phases(sizes), planner.rewards.not_counted
    prompt_size = sum(tensor.nbytes for tensor in planner.prompt.tensors.values())
    return MemoryPlan(sizes, phases, planner.parameters, lora_layers, unknown, prompt_size)


class _Planner:
    """The sizes and phases of a run, in bytes.

    One network stands for both trained ones, which are alike. FSDP divides what it shards by the number of processes.
    """

    def __init__(self, config: RunConfig, device_type: str, rewards: Sequence[Reward] | None) -> None:
        self.run, self.device_type = config, device_type
        self.teacher, revision = config.teacher.configuration, config.teacher.revision
        self.options = options_for(self.teacher, prompt_options(config))
        self.dtype, self.is_lora = DTYPES[config.memory.mixed_precision], config.is_lora
        self.autocast = None if self.is_lora or config.memory.mixed_precision == "no" else self.dtype
        self.shown = min(  # pictures drawn at once at the end
            config.output.num_validation_images, config.optimisation.train_batch_size, PICTURES_AT_ONCE
        )
        self.on_the_fly = config.prompts.encode_prompts == ON_THE_FLY
        groups = config.optimisation.samples_per_update // (config.method.group_size * config.method.steps_per_rollout)
        self.read = config.prompts.encode_batch_size  # prompts at once
        if self.on_the_fly:
            self.read = min(self.read, max(groups, config.output.monitor_images))
        self.shards = int(os.environ.get("WORLD_SIZE", "1")) if is_sharded_launch() else 1
        # Whether a role has all its gradients during a backward; otherwise they grow as activations are freed.
        self.has_gradients = config.optimisation.gradient_accumulation_steps > 1 or self.shards > 1
        self.config = pipeline_config(self.teacher, revision=revision)
        self.family = family_of(self.config)
        if self.is_lora:
            check_lora(self.family)
        without = ["vae"] if config.teacher.pretrained_vae_model_name_or_path else []
        if file := SingleFile.of(config.teacher.pretrained_model_name_or_path, config.teacher.single_file_config):
            without += parts_of(file, self.config, self.family, revision=revision)
        check_kinds_of_files("teacher", self.teacher, self.config, config.teacher.variant, without, revision=revision)
        self._load()
        self.rewards = measure_rewards(config, rewards, self.family, self.pipeline, self.latents)
        self.networks = self._make_networks()
        self.trained = self.networks.parameters(STUDENT)
        self.trained_size = sum(parameter.nbytes for parameter in self.trained)

    def _load(self) -> None:
        """The teacher's networks, and their sizes before anything is added to them."""
        models = model.meta_models(self.teacher, self.config, self.run.teacher.revision)
        self.pipeline = model.meta_pipeline(self.family, models)
        self.denoiser: Any = models[self.family.denoiser_name]
        self.encoders = [each for name, each in models.items() if name.startswith("text_encoder")]
        self.parameters = {name: sum(p.numel() for p in each.parameters()) for name, each in models.items()}
        for each in models.values():
            nn.Module.to(each, self.dtype)  # diffusers' own `to` logs
        prepare_vae(self.pipeline.vae, self.run.memory)
        self.plain_size = model.nbytes(self.denoiser)
        if self.run.student.quantization:
            model.quantise(self.denoiser, self.run.student.quantization)
        self.frozen_size = model.nbytes(self.denoiser)
        shapes = (self.family.latent_shape(self.pipeline, size) for size in self.run.teacher.sizes)
        self.latents = max(shapes, key=math.prod)  # the largest bucket
        self.latent_size = FLOAT * math.prod(self.latents)
        self.prompt = model.conditioning(self.family, self.pipeline, self.options, self.dtype)

    def _make_networks(self) -> Networks:
        """The roles, with a noise schedule that has no table and so works on the meta device."""
        config, name = replace(self.run, memory=MemoryConfig(mixed_precision="no")), self.family.denoiser_name
        trained = self.denoiser
        if not self.is_lora:
            alone = model.meta_models(self.teacher, {name: self.config[name]}, self.run.teacher.revision)
            trained = alone[name].requires_grad_(True)
        if self.run.memory.gradient_checkpointing:
            for network, dtype in {self.denoiser: None, trained: self.autocast}.items():
                model.checkpoint_blocks(network, self.family, dtype, self.device_type)
        with torch.device("meta"), no_init_weights():
            networks = make_networks(
                config,
                self.family,
                self.denoiser,
                lambda: trained,
                schedule=NoiseSchedule(None, 1000),
                prediction_type="flow_prediction",
                null_conditioning=self.prompt,
                guidance_scale=guidance_outside(config, self.family, self.pipeline),
            )
        if self.is_lora:
            self.parameters["lora"] = sum(parameter.numel() for parameter in networks.parameters(STUDENT))
        model.inference_peak(lambda: add_to_fake_score(networks, self.family, config, self.latents), *networks.modules)
        return networks

    def sizes(self) -> dict[str, int]:
        """Bytes by purpose."""
        run, shards, shown, trained_size = self.run, self.shards, self.shown, self.trained_size
        count = len(self.networks.trained_roles)
        samples, whole = run.optimisation.train_batch_size, not self.is_lora and run.student.quantization
        inputs = self._inputs(samples)
        learning = self.has_gradients, self.autocast, self.device_type
        saved, update = peaks(self.networks, inputs, run.method.algorithm, *learning)
        role = trained_size if self.is_lora else model.nbytes(self.networks.modules[0])  # with a full network's buffers
        return {
            f"{self.family.denoiser_name}, frozen": self.frozen_size // (1 if whole else shards),
            (LORAS if self.is_lora else FULL)[count]: count * role // shards,
            OPTIMISERS[count]: count * sum(self._states(parameter.numel()) for parameter in self.trained) // shards,
            "the discriminator": discriminator_size(self.networks, self._states),
            "the target's LoRA": sum(p.nbytes for p in self.networks.parameters(TARGET)) // shards,
            "the student's moving average": trained_size // shards if run.optimisation.use_ema else 0,
            "folded copies of adapted weights": (count + bool(self.networks.target_config)) * self._folded(),
            "blocks gathered from all processes": self._gathered() if shards > 1 else 0,
            "a group's rollouts": self._rollouts(),
            "gradients of one role": self._gradients() if self.has_gradients else 0,
            f"activations of {samples} samples": saved,
            "forward and backward, at most": update,
            "teacher, at most": samples * self._teacher_peak,
            "optimiser's step, at most": self._step_peak() // shards,
            "text encoders": model.nbytes(*self.encoders),
            f"reading {self.read} prompts, at most": self._reading_peak(self.read),
            "autoencoder": model.nbytes(self.pipeline.vae),
            "decoding a picture, at most": self._decoding_peak,
            "rewards": self.rewards.weights,
            "the rewards' own autoencoder": self.rewards.vae,
            f"decoding and scoring {self.rewards.pictures} pictures, at most": self.rewards.peak,
            f"drawing {shown} pictures at the end, at most": max(shown * self._teacher_peak, self._last_decoding),
        }

    def _states(self, numbers: int) -> int:
        """AdamW's two states of a tensor; in few bits with two float32 scales for each block of numbers."""
        kind = kinds_of(self.run.memory)[0]
        if kind.bits < 32 and numbers >= SMALLEST_8BIT:
            return 2 * numbers * kind.bits // 8 + 2 * FLOAT * (numbers // kind.block + 1)
        return 2 * FLOAT * numbers

    def _folded(self) -> int:
        """One role's folded weights, and a copy of the adapter that they were computed from."""
        if not isinstance(self.networks, SharedBase) or not self.run.fold_adapters:
            return 0
        layers = self.networks.layers.values()
        return sum(int(layer.get_base_layer().weight.nbytes) for layer in layers) + self.trained_size

    def _gathered(self) -> int:
        """FSDP gathers all weights outside of blocks, the current block and its gradients, and the next block.

        The weights are in the compute dtype, and the gradients in float32.
        """
        network = self.networks.modules[0]
        kinds: Any = network._no_split_modules or ()
        blocks = [f"{name}." for name, each in network.named_modules() if type(each).__name__ in kinds]
        own: Counter[str] = Counter()
        for name, parameter in network.named_parameters():
            own[max((block for block in blocks if name.startswith(block)), key=len, default="")] += parameter.nbytes
        outside, largest = own.pop("", 0), max(own.values(), default=0)
        share = 1.0 if self.autocast is None else self.dtype.itemsize / FLOAT
        return int(share * (outside + 2 * largest) + (0 if self.is_lora else largest))

    def _gradients(self) -> int:
        """One role's; whole ones where FSDP averages only after the last of several micro-batches."""
        waits = self.run.optimisation.gradient_accumulation_steps > 1 and not self.run.memory.sync_each_batch
        return self.trained_size // (1 if waits else self.shards)

    def _rollouts(self) -> int:
        """An update's states, predictions, noises and prompts, about."""
        method, samples = self.run.method, self.run.optimisation.samples_per_update
        prompt = sum(tensor.nbytes for tensor in self.prompt.tensors.values())
        latents = 4 * method.num_student_steps + 8 + (6 + self.run.times.decoupled_guidance) * method.num_renoisings
        return int(samples * (latents * self.latent_size + 3 * prompt))

    def _trajectory(self, pictures: int, steps: int) -> int:
        return 7 * steps * pictures * self.latent_size  # three tensors a step, stacked into four

    def _inputs(self, batch: int) -> tuple[Any, ...]:
        x_t, t = torch.empty(batch, *self.latents, device="meta"), torch.empty(batch, device="meta")
        return x_t, t, self.prompt[torch.zeros(batch, dtype=torch.long)]

    @cached_property
    def _teacher_peak(self) -> int:
        """Of one sample; without gradients, memory is proportional to the batch."""
        inputs = self._inputs(1)
        return model.inference_peak(lambda: self.networks.predict(TEACHER, *inputs), *self.networks.modules)

    @cached_property
    def _decoding_peak(self) -> int:
        """Of one picture."""
        return model.inference_peak(
            lambda: self.family.decode(self.pipeline, torch.empty(1, *self.latents, device="meta")), self.pipeline.vae
        )

    @property
    def _last_decoding(self) -> int:
        """Of the pictures that are drawn at once at the end."""
        return (1 if self.run.memory.enable_vae_slicing else self.shown) * self._decoding_peak

    def _reading_peak(self, batch: int) -> int:
        """The hungriest text encoder's."""
        tokens = self.prompt.tensors["prompt_embeds"].shape[1] + self.family.extra_encoder_tokens
        return max(model.encoding_peak(encoder, batch, tokens) for encoder in self.encoders)

    def _step_peak(self) -> int:
        """The gradients, and AdamW's square roots: of all tensors at once on a GPU, otherwise of one at a time."""
        largest = max(parameter.nbytes for parameter in self.trained)
        kind = kinds_of(self.run.memory)[0]
        at_once = self.device_type == "cuda" and kind.package == "torch" and not kind.is_fused
        return self.trained_size + (self.trained_size if at_once else 2 * largest)

    def phases(self, sizes: dict[str, int]) -> dict[str, int]:
        """Each phase's peak, in the order of a run."""
        run, names = self.run, list(sizes)
        rollouts, gradients = sizes["a group's rollouts"], sizes["gradients of one role"]
        average = sizes["the student's moving average"] if run.memory.offload else 0
        # What the rewards need, and what of it stays on the device between two uses.
        shares_vae = bool(run.rewards.reward) and not run.rewards.reward_vae
        scoring = self.rewards.weights + self.rewards.vae + shares_vae * sizes["autoencoder"]
        held = 0 if run.memory.offload else scoring
        stays = sum(sizes[name] for name in names[: names.index("a group's rollouts")]) + held - average
        # Only text encoders are on the device; before, a denoiser may have been quantised there.
        quantised = self.frozen_size if run.student.quantization in NEEDS_GPU else 0
        encoders, prompts = sizes["text encoders"], sizes[f"reading {self.read} prompts, at most"]
        loaded = 0 if run.memory.offload else self.rewards.weights
        stays += encoders if self.on_the_fly and not run.memory.offload else 0
        on_the_fly = stays + rollouts + prompts + (encoders if run.memory.offload else 0)
        # The optimisers have no states yet; the pictures' whole trajectory is kept.
        trajectory = self._trajectory(run.output.monitor_images, CONTRAST_STEPS)
        contrast = stays - sizes[OPTIMISERS[len(self.networks.trained_roles)]] + trajectory + sizes["teacher, at most"]
        # The autoencoder, unless rewards hold it already; one picture's decoding; and all pictures, twice.
        count, area = run.output.num_validation_images, math.prod(self.latents[1:]) * self.pipeline.vae_scale_factor**2
        pictures = int(sizes["decoding a picture, at most"] + 2 * FLOAT * count * 3 * area)
        validation = pictures + (0 if held and shares_vae else sizes["autoencoder"])
        validation += self._trajectory(count, run.method.num_student_steps)
        external = {"external rewards": stays - held + scoring + rollouts + self.rewards.peak}
        return {
            "reading the prompts": max(quantised, encoders + prompts) + loaded,
            "the teacher's pictures": contrast if run.output.monitor_images else 0,
            **({"reading an update's prompts": on_the_fly} if self.on_the_fly else {}),
            "rollouts and R_dm": stays + rollouts + sizes["teacher, at most"] + self._folded(),
            **(external if run.rewards.reward else {}),
            "forward and backward": stays + rollouts + gradients + sizes["forward and backward, at most"],
            "optimiser's step": stays + rollouts + sizes["optimiser's step, at most"],
            "validation pictures": stays + rollouts + validation,
            "the last pictures": self._last(sizes),
        }

    def _last(self, sizes: dict[str, int]) -> int:
        """Teacher and student as stock pipelines, which share everything but the denoiser."""
        student, shown = self.frozen_size if self.is_lora else self.plain_size, self.shown
        reading, teacher, decoding = self._reading_peak(shown), shown * self._teacher_peak, self._last_decoding
        if not self.run.memory.offload:
            networks = self.frozen_size + student + sizes["text encoders"] + sizes["autoencoder"]
            return networks + max(reading, teacher, decoding)
        alone = [model.nbytes(encoder) + reading for encoder in self.encoders]
        return max(max(self.frozen_size, student) + teacher, sizes["autoencoder"] + decoding, *alone)
