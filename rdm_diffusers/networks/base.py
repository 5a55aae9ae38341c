"""What all networks of a distillation have in common: roles, one call that returns x0, and its two backwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..families import Conditioning, Family
from ..prediction import NoiseSchedule, expand, to_x0
from .discriminator import Discriminator, Features

STUDENT, FAKE_SCORE, TEACHER = ROLES = ("student", "fake_score", "teacher")
TARGET = "target"  # the teacher with a LoRA that learns from images
ADAPTERS = {STUDENT: "default", FAKE_SCORE: "fake_score", TARGET: "target"}  # `default` is the name of what is exported


@dataclass(kw_only=True, eq=False, repr=False)
class Networks(ABC):
    """Three roles behind `predict`, and a fourth, the target, if `target_config` is given.

    Args:
        family: how the denoiser is called.
        schedule: the teacher's noise schedule.
        prediction_type: what the denoisers' output means.
        null_conditioning: the empty prompt, of length 1, for the teacher's guidance.
        guidance_scale: w in u + w (c - u), for the teacher alone; 1 is off.
        guidance_interval: the times, as shares of the timesteps, between which the teacher is guided; () for all.
        compute_dtype: what trained full networks are cast to (`acting_as`); by default they are not, or not here.
        target_config: the shape of the target's LoRA, which is added to the teacher's network; None for no target.

    Attributes:
        calls: samples that went through each role, as `{"student forward": ..., ...}`; a guided one counts twice.
        step_embedding: the fake score's vector of each student step `[K, D]`, if it has them.
        discriminator: on the fake score's features, if there is one; its parameters are the fake score's.
    """

    family: Family
    schedule: NoiseSchedule
    prediction_type: str
    null_conditioning: Conditioning
    guidance_scale: float
    guidance_interval: tuple[float, ...] = ()
    compute_dtype: torch.dtype | None = None
    target_config: LoraConfig | None = None
    calls: Counter[str] = field(default_factory=Counter, init=False)
    step_embedding: nn.Parameter | None = field(default=None, init=False)
    discriminator: Discriminator | None = field(default=None, init=False)
    autocast_roles: ClassVar[tuple[str, ...]] = ()
    _step: Tensor | None = field(default=None, init=False)  # of the samples in the fake score's forward

    def add_step_embedding(self, time_embedding: nn.Module, num_steps: int) -> None:
        """Conditions the fake score on the student's step that a sample comes from. Ours, not the paper's.

        A trainable vector per step, 0 at first, is added to the output `[B, ..., D]` of its time embedding.
        `time_embedding` is that module, inside the fake score's network, and `num_steps` is K.
        """
        last = [m for m in time_embedding.modules() if isinstance(m, nn.Linear | LoraLayer)][-1]
        self.step_embedding = nn.Parameter(torch.zeros(num_steps, last.out_features, device=last.weight.device))

        def add_step(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._step is None or self.step_embedding is None:
                return None
            rows = self.step_embedding[self._step.to(output.device, non_blocking=True)].to(output.dtype)
            rows = rows.view(len(rows), *[1] * (output.ndim - 2), -1)
            return torch.cat([output[: len(rows)] + rows, output[len(rows) :]])  # there may be one more, of time 0

        time_embedding.register_forward_hook(add_step)

    def add_discriminator(self, block: nn.Module, x_t: Tensor, t: Tensor) -> None:
        """Lets a new discriminator read what a block of the fake score's network puts out; one forward finds its width.

        Args:
            block: inside that network.
            x_t, t: of that forward, `[1, C, H, W]` and `[1]`, on the networks' device; its result is not used.
        """
        features, calls = Features(block), self.calls.copy()
        with torch.no_grad(), features.collected() as found:
            self.predict(FAKE_SCORE, x_t, t, self.null_conditioning)
        self.calls = calls
        self.discriminator = Discriminator(features, found[0].shape[-1]).to(x_t.device)

    @property
    def real_score(self) -> str:
        """The role towards whose distribution R_dm moves the student: the target if there is one, else the teacher."""
        return TEACHER if self.target_config is None else TARGET

    def predict(
        self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning, step: Tensor | None = None,
        guided: bool = True,
    ) -> Tensor:  # fmt: skip
        """The role's x0 for noisy samples.

        Args:
            role: `student`, `fake_score`, `teacher` or `target`; only the teacher is guided, unless `guided` is false.
            x_t, t, conditioning: `[B, C, H, W]`, times `[B]`, and of length B.
            step: the student's step of each sample `[B]`; read by a fake score with a step embedding only.

        Returns:
            x0 `[B, C, H, W]`, float32. Gradients flow to the role's parameters and to x_t, by `backward` only.
        """
        self._step = step if role == FAKE_SCORE else None
        guided = guided and role == TEACHER and self.guidance_scale != 1
        output = self._guided(x_t, t, conditioning)[0] if guided else self._output(role, x_t, t, conditioning)
        return to_x0(self.prediction_type, output, x_t, *self.schedule.scales(t, x_t))

    def fake_score(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning, step: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The fake score's x0 as of `predict`, and the discriminator's logits `[B]` of the same forward, if it has one.

        Gradients flow from both to the fake score's parameters and to x_t, by `backward` only.
        """
        if self.discriminator is None:
            return self.predict(FAKE_SCORE, x_t, t, conditioning, step), None
        with self.discriminator.features.collected() as features:
            x0 = self.predict(FAKE_SCORE, x_t, t, conditioning, step)
        return x0, torch.cat([self.discriminator(each) for each in features])

    def guidance(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """What guidance adds to the teacher's x0 `[B, C, H, W]`, float32: (w - 1) (c - u) in x0. As `predict` else."""
        outputs, scales = self._guided(x_t, t, conditioning), self.schedule.scales(t, x_t)
        return torch.sub(*(to_x0(self.prediction_type, output, x_t, *scales) for output in outputs))

    def backward(self, role: str, x0: Tensor, direction: Tensor, *more: tuple[Tensor, Tensor]) -> None:
        """Adds the gradient of `(x0 * direction).sum()` to the role's parameters, with the role restored.

        Args:
            role, x0: whose `predict` gave x0 `[B, C, H, W]`, with its graph; or logits `[B]` of `fake_score`.
            direction: the loss's gradient with respect to x0, same shape, detached.
            more: other outputs of the same forward, with their directions.
        """
        self.calls[f"{role} backward"] += len(x0)
        outputs, directions = zip((x0, direction), *more, strict=True)
        with self.acting_as(role):
            torch.autograd.backward(outputs, directions)

    def pull_back(
        self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning, cotangent: Tensor | None,
        step: Tensor | None = None, logit: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The gradient of `(x0 * cotangent).sum()` with respect to x_t `[B, C, H, W]`, float32, detached.

        x0 is what `predict` gives for the same arguments; it is computed anew. No parameter's gradient changes. With
        `logit [B]` the gradient of `(logits * logit).sum()` is added, of the discriminator's logits there
        (`fake_score`); then the cotangent may be None.
        """
        inputs = x_t.detach().requires_grad_()
        given = (inputs, t, conditioning, step)
        with torch.enable_grad():
            outputs = (self.predict(role, *given), None) if logit is None else self.fake_score(*given)
        both = zip(outputs, (cotangent, logit), strict=True)
        pairs = [(output, each) for output, each in both if output is not None and each is not None]
        guided = role == TEACHER and self.guidance_scale != 1
        self.calls[f"{role} backward"] += len(x_t) * (1 + guided)
        with self.acting_as(role):
            (gradient,) = torch.autograd.grad([each for each, _ in pairs], inputs, [each for _, each in pairs])
        return gradient.float()

    @contextmanager
    def acting_as(self, role: str) -> Iterator[None]:
        """A context in which the role's network is called, forward and backward: its adapter and its precision are on.

        The precision policy, for all kinds of networks: trained weights, their gradients and their optimisers are
        float32; what is large is computed in the compute dtype. A frozen network is already in that dtype. So is a base
        that roles share, and its float32 adapters cast themselves (`adapters.py`), because autocast would move the
        base's norms to float32. A trained full network (`autocast_roles`) runs under autocast.
        """
        with self._switched_to(role), self._autocast(role):
            yield

    def _autocast(self, role: str) -> AbstractContextManager[Any]:
        off = self.compute_dtype is None or role not in self.autocast_roles
        device = "meta" if off else next(self.modules[0].parameters()).device.type  # meta has no autocast
        return nullcontext() if device == "meta" else torch.autocast(device, self.compute_dtype)

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The role's trainable parameters, in a fixed order."""
        embedding = [self.step_embedding] if self.step_embedding is not None and role == FAKE_SCORE else []
        discriminator = [] if self.discriminator is None else list(self.discriminator.parameters())
        return self._own_parameters(role) + embedding + (discriminator if role == FAKE_SCORE else [])

    @abstractmethod
    def student_weights(self, keep: bool = True) -> dict[str, Tensor]:
        """A copy of the student's trained weights by their names in its state dict, float32, on the CPU, whole.

        Where they are sharded every process must call this; one that does not `keep` them gets an empty dictionary.
        """

    @property
    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """The networks, each once."""

    def place(self, move: Callable[[nn.Module], None]) -> None:
        """Has `move` put every network on a device or in shards, in place; `parameters` are new ones afterwards."""
        for module in self.modules:
            move(module)

    @abstractmethod
    def _own_parameters(self, role: str) -> list[nn.Parameter]:
        """The trainable parameters in the role's network."""

    @abstractmethod
    def _network(self, role: str) -> Any:
        """The role's network, to be called inside `acting_as(role)`."""

    def _switched_to(self, role: str) -> AbstractContextManager[None]:
        """A context in which shared modules are the role's."""
        return nullcontext()

    def _output(self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls[f"{role} forward"] += len(x_t)
        calls, outputs = self.family.calls(x_t, t, conditioning, self._step), list[Tensor]()
        with self.acting_as(role):
            for *inputs, self._step in calls:
                outputs.append(self.family.denoise(self._network(role), *inputs).float())
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _guided(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """The teacher's outputs with guidance and without."""
        both = Conditioning.cat([self.family.unconditional(self.null_conditioning, conditioning), conditioning])
        unconditional, conditional = self._output(TEACHER, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        scale: float | Tensor = self.guidance_scale
        if self.guidance_interval:
            scale = expand(torch.where(self.schedule.lie_between(t, *self.guidance_interval), scale, 1.0), x_t)
        return self.family.guide(unconditional, conditional, scale), conditional
