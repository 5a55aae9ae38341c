"""The three roles of a distillation, *student*, *fake score* and *teacher*, behind one call that speaks x0.

`SharedBase` keeps one frozen base and two LoRAs, so that a student costs little more memory than its teacher. It has a
silent trap: if another adapter is active during backward than during forward, the gradients are missing or wrong and
nothing says so. `Networks.backward` is the way out: it restores the role before the graph is walked.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from torch.func import functional_call

from .adapters import compute_in_input_dtype
from .families import Conditioning, Family
from .prediction import NoiseSchedule, to_x0
from .sharding import whole

STUDENT, FAKE_SCORE, TEACHER = ROLES = ("student", "fake_score", "teacher")
ADAPTERS = {STUDENT: "default", FAKE_SCORE: "fake_score"}  # `default` is the name that diffusers exports


class Networks(ABC):
    """Three roles behind `predict`.

    Args:
        family: how the denoiser is called.
        schedule: the teacher's noise schedule.
        prediction_type: what the denoisers' output means.
        null_conditioning: the empty prompt, of length 1, for the teacher's guidance.
        guidance_scale: w in u + w (c - u), for the teacher alone; 1 is off.

    Attributes:
        calls: how many samples went through each role, as `{"student forward": ..., "student backward": ...}`; a guided
            sample counts twice.
    """

    def __init__(
        self,
        family: Family,
        schedule: NoiseSchedule,
        prediction_type: str,
        null_conditioning: Conditioning,
        guidance_scale: float,
    ):
        self.family = family
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.null_conditioning = null_conditioning
        self.guidance_scale = guidance_scale
        self.calls: Counter[str] = Counter()
        self.step_embedding: nn.Parameter | None = None
        self._told: Tensor | None = None

    def tell_steps(self, time_embedding: nn.Module, num_steps: int) -> None:
        """Lets the fake score know which of the student's steps a sample comes from. Ours, not the paper's.

        A trainable vector per step, 0 at first, is added to the output `[B, D]` of the fake score's time embedding.

        Args:
            time_embedding: the module, inside the fake score's network.
            num_steps: K.
        """
        reference = next(time_embedding.parameters())
        width = [m for m in time_embedding.modules() if isinstance(m, nn.Linear | LoraLayer)][-1].out_features
        self.step_embedding = nn.Parameter(torch.zeros(num_steps, width, device=reference.device))

        def tell(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
            if self._told is None or self.step_embedding is None:
                return None
            return output + self.step_embedding[self._told].to(output.dtype)

        time_embedding.register_forward_hook(tell)

    def predict(
        self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning, step: Tensor | None = None
    ) -> Tensor:
        """The role's x0 for noisy samples.

        Args:
            role: `student`, `fake_score` or `teacher`; only the teacher is guided.
            x_t: `[B, C, H, W]`.
            t: times `[B]`.
            conditioning: of length B.
            step: which of the student's steps each sample comes from `[B]`; read by a fake score that was told to
                (`tell_steps`), ignored otherwise.

        Returns:
            x0 `[B, C, H, W]`, float32. Gradients flow to the role's trainable parameters and to x_t; walk them with
            `backward` only.
        """
        self._told = step if role == FAKE_SCORE else None
        alpha, sigma = self.schedule.scales(t, x_t)
        if role == TEACHER and self.guidance_scale != 1:
            output = self._guided(x_t, t, conditioning)
        else:
            output = self._output(role, x_t, t, conditioning)
        return to_x0(self.prediction_type, output, x_t, alpha, sigma)

    def backward(self, role: str, x0: Tensor, direction: Tensor) -> None:
        """Adds the gradient of `(x0 * direction).sum()` to the role's parameters, with the role restored.

        Args:
            role: the role whose `predict` gave `x0`.
            x0: `[B, C, H, W]` with its graph.
            direction: the loss's gradient with respect to x0, same shape, detached.
        """
        self.calls[f"{role} backward"] += len(x0)
        with self.acting_as(role):
            x0.backward(direction)

    @abstractmethod
    def acting_as(self, role: str):
        """A context in which the denoiser that `denoiser` names is the given role."""

    @abstractmethod
    def parameters(self, role: str) -> list[nn.Parameter]:
        """The role's trainable parameters, in a fixed order."""

    @abstractmethod
    def student_weights(self) -> dict[str, Tensor]:
        """A copy of the student's trained weights by their names in its state dict, float32, on the CPU.

        Where they are sharded every process must ask, and all get them whole.
        """

    @property
    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """The networks, each once."""

    @abstractmethod
    def place(self, put: Callable[[nn.Module], None]) -> None:
        """Has `put` move or spread every network, in place; `parameters` are others afterwards."""

    @abstractmethod
    def _callable(self, role: str) -> Callable[..., tuple]:
        """The role's network, to be called inside `acting_as(role)`."""

    def _step_embeddings(self, role: str) -> list[nn.Parameter]:
        return [self.step_embedding] if role == FAKE_SCORE and self.step_embedding is not None else []

    def _output(self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls[f"{role} forward"] += len(x_t)
        with self.acting_as(role):
            return self.family.denoise(self._callable(role), x_t, t, conditioning).float()

    def _guided(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        both = Conditioning.cat([self.null_conditioning.expand(len(x_t)), conditioning])
        output = self._output(TEACHER, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        unconditional, conditional = output.chunk(2)
        return self.family.guide(unconditional, conditional, self.guidance_scale)


def _exported(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies in float32 on the CPU, which later updates do not change."""
    return {name: whole(tensor.detach()).to("cpu", torch.float32, copy=True) for name, tensor in weights.items()}


class SeparateNetworks(Networks):
    """One full network a role.

    Args:
        denoisers: a module for each role; the teacher's is frozen here.
        others: as for `Networks`.
        compute_dtype: what the trained networks, whose weights stay as they are, compute in (autocast); their own dtype
            by default.
    """

    def __init__(self, denoisers: Mapping[str, nn.Module], *others, compute_dtype: torch.dtype | None = None):
        super().__init__(*others)
        self.denoisers = denoisers
        self.compute_dtype = compute_dtype
        denoisers[TEACHER].requires_grad_(False)

    @contextmanager
    def acting_as(self, role: str) -> Iterator[None]:
        """Nothing is switched; the trained roles compute in `compute_dtype`."""
        if self.compute_dtype is None or role == TEACHER:
            yield
            return
        device = next(self.denoisers[role].parameters()).device
        with torch.autocast(device.type, self.compute_dtype):
            yield

    def parameters(self, role: str) -> list[nn.Parameter]:
        own = [parameter for parameter in self.denoisers[role].parameters() if parameter.requires_grad]
        return own + self._step_embeddings(role)

    def student_weights(self) -> dict[str, Tensor]:
        return _exported(self.denoisers[STUDENT].state_dict())

    @property
    def modules(self) -> list[nn.Module]:
        return [self.denoisers[role] for role in ROLES]

    def place(self, put: Callable[[nn.Module], None]) -> None:
        for denoiser in self.modules:
            put(denoiser)

    def _callable(self, role: str) -> nn.Module:
        return self.denoisers[role]


class SharedBase(Networks):
    """One frozen base with two LoRAs: adapter `default` is the student, `fake_score` the fake score, none the teacher.

    Args:
        denoiser: the teacher's network; it is frozen, and the adapters are added to it in float32. They compute in the
            dtype of what they read, which is the base's.
        lora_config: the shape of both adapters.
        fold_adapters: compute `W + scale B A` once per update and run the base with those weights, instead of the
            adapters' own small layers. The same numbers to rounding and fewer operations, at the price of one more copy
            of the adapted weights per role.
        others: as for `Networks`.

    Raises:
        ValueError: if adapters are to be folded while gradient checkpointing is on, whose recomputation would not see
            the folded weights, or into a base that is not float32, which would round them away.
    """

    def __init__(self, denoiser: ModelMixin, lora_config: LoraConfig, fold_adapters: bool, *others):
        super().__init__(*others)
        if fold_adapters and getattr(denoiser, "is_gradient_checkpointing", False):
            raise ValueError("--fold_adapters and --gradient_checkpointing exclude each other; drop one of them.")
        if fold_adapters and torch.finfo(denoiser.dtype).bits < 32:
            raise ValueError("--fold_adapters needs a float32 base: a coarser one rounds the adapters away.")
        self.denoiser = denoiser.requires_grad_(False)
        self.fold_adapters = fold_adapters
        with warnings.catch_warnings():  # peft warns of a second adapter, which is what we are here for
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            for adapter in ADAPTERS.values():
                denoiser.add_adapter(lora_config, adapter)
        self.layers = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
        self._trainable = {role: self._adapter_parameters(adapter) for role, adapter in ADAPTERS.items()}
        for parameter in chain(*self._trainable.values()):
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
        for layer in self.layers.values():
            compute_in_input_dtype(layer)
        self._folded: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
        self._wear(None)

    def parameters(self, role: str) -> list[nn.Parameter]:
        return self._trainable.get(role, []) + self._step_embeddings(role)

    def student_weights(self) -> dict[str, Tensor]:
        return _exported(get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTERS[STUDENT]))

    @property
    def modules(self) -> list[nn.Module]:
        return [self.denoiser]

    def place(self, put: Callable[[nn.Module], None]) -> None:
        put(self.denoiser)
        self._trainable = {role: self._adapter_parameters(adapter) for role, adapter in ADAPTERS.items()}

    def _adapter_parameters(self, adapter: str) -> list[nn.Parameter]:
        return [p for name, p in self.denoiser.named_parameters() if "lora_" in name and f".{adapter}." in name]

    @contextmanager
    def acting_as(self, role: str) -> Iterator[None]:
        """Wears the role's adapter, and afterwards whatever was worn before."""
        before = self._worn
        self._wear(ADAPTERS.get(role))
        try:
            yield
        finally:
            self._wear(before)

    def _wear(self, adapter: str | None) -> None:
        """A light switch: unlike peft's own it leaves `requires_grad` alone and takes microseconds."""
        self._worn = adapter
        for layer in self.layers.values():
            layer._disable_adapters = adapter is None or self.fold_adapters
            if adapter is not None:
                layer._active_adapter = [adapter]

    def _callable(self, role: str) -> Callable[..., tuple]:
        if not self.fold_adapters or role == TEACHER:
            return self.denoiser
        weights = self._weights(role)
        return lambda *args, **kwargs: functional_call(self.denoiser, weights, args, kwargs, tie_weights=False)

    def _weights(self, role: str) -> dict[str, Tensor]:
        """The base's weights with the role's adapter folded in; without a graph they are kept until it changes.

        The adapter's numbers are compared, not their version counters, which moving averages and checkpoints bypass.
        """
        if torch.is_grad_enabled():
            return self._fold(role)
        adapter = torch.cat([parameter.detach().flatten() for parameter in self._trainable[role]])
        if role not in self._folded or not torch.equal(self._folded[role][0], adapter):
            self._folded[role] = adapter, self._fold(role)
        return self._folded[role][1]

    def _fold(self, role: str) -> dict[str, Tensor]:
        weights = {}
        for name, layer in self.layers.items():
            base = layer.get_base_layer().weight
            weights[f"{name}.base_layer.weight"] = base + layer.get_delta_weight(ADAPTERS[role]).to(base.dtype)
        return weights
