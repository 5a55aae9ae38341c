"""One optimiser a role: a kind of AdamW, clipping, the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..config import RunConfig
from ..config.optimizers import kind_of
from ..sharding import gather
from .finite import FiniteChecks
from .loss_scaling import LossScaler

PAGED = ("state1", "state2")  # bitsandbytes' names of AdamW's two states
BUCKET = 2**26  # bytes of gradients that are averaged over processes at once


@dataclass
class RoleOptimizer:
    """A role's trainable parameters with what moves them. The schedule is a function of the update alone."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer  # one of `OPTIMIZERS`
    schedule: torch.optim.lr_scheduler.LambdaLR  # of its learning rate
    max_grad_norm: float  # the norm that gradients are clipped to; 0 clips nothing
    scaler: LossScaler | None = None  # of gradients that are computed in float16
    has_moved: bool = False  # whether the last step changed the parameters, and did not overflow in float16

    def step(self, checks: FiniteChecks | None = None) -> Tensor:
        """Averages over processes, clips, steps and clears the gradients; returns the norm before clipping, a scalar.

        Gradients that were scaled for float16 and overflow are dropped, and the next ones are scaled less.
        Raises NonFiniteError if what `checks` noted or the norm is not finite; the parameters are untouched then.
        """
        average_gradients(self.parameters)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        kinds = by_kind(self.parameters)
        norm: Tensor = torch.stack(
            [gather(get_total_norm([p.grad for p in k if p.grad is not None])) for k in kinds]
        ).norm()
        may_overflow = self.scaler is not None and self.scaler.may_overflow
        self.has_moved = (checks or FiniteChecks()).require(norm, may_overflow)
        if self.has_moved:
            for kind in kinds if self.max_grad_norm else []:
                clip_grads_with_norm_(kind, self.max_grad_norm, norm)
            self.optimizer.step()
        if self.scaler is not None:
            self.scaler.end_step(overflowed=not self.has_moved)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def set_update(self, update: int) -> None:
        """Gives every parameter group its learning rate at an update."""
        groups = zip(self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        for group, base, factor in groups:
            if isinstance(group["lr"], Tensor):  # as torchao's are
                group["lr"].fill_(base * factor(update))
            else:
                group["lr"] = base * factor(update)


def by_kind(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that have gradients, the sharded apart from the others, because no operation takes both."""
    moving = [parameter for parameter in parameters if parameter.grad is not None]
    kinds = [[p for p in moving if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
    return [kind for kind in kinds if kind]


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Averages the gradients over all processes, as data parallelism does; nothing to do on one process.

    Sharded gradients are averaged already, in the backward.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    replicated = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    for bucket in buckets(replicated):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for parameter, part in zip(bucket, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = part.view_as(parameter)


def buckets(parameters: Sequence[nn.Parameter], most: int = BUCKET) -> Iterator[list[nn.Parameter]]:
    """The parameters in lists of about so many bytes, so that averaging takes little memory of its own."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bucket.append(parameter)
        size += parameter.nbytes
        if size >= most:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


@torch.no_grad()
def update_average(ema: EMAModel, parameters: Sequence[nn.Parameter]) -> None:
    """`ema.step(parameters)` to the bit, on the average's own device, on a GPU many tensors at once.

    Where that is not the parameters' (`--offload`), they are copied to it: half of what moving the average back and
    forth would transfer, and no memory of the device. EMAModel's own `foreach` rounds differently.
    """
    ema.optimization_step += 1
    rest, averages = 1 - ema.get_decay(ema.optimization_step), iter(ema.shadow_params)
    one_by_one = ema.shadow_params[0].device.type == "cpu"  # where a tensor stays in the cache, and calls are cheap
    for bucket in buckets(parameters, 1 if one_by_one else BUCKET):
        old = [next(averages) for _ in bucket]
        apart = torch._foreach_sub(old, [new.to(average.device) for new, average in zip(bucket, old, strict=True)])
        torch._foreach_mul_(apart, rest)
        torch._foreach_sub_(old, apart)


@contextmanager
def averaged(ema: EMAModel, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters have their moving average; afterwards their own values again, bit for bit."""
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def make_optimizer(parameters: list[nn.Parameter], learning_rate: float, config: RunConfig) -> RoleOptimizer:
    """The run's kind of AdamW with its schedule; ImportError if its package is not installed."""
    optimisation, kind = config.optimisation, kind_of(config.memory)
    optimizer = getattr(import_module(kind.module), kind.name)(
        parameters,
        lr=learning_rate,
        betas=(optimisation.adam_beta1, optimisation.adam_beta2),
        weight_decay=optimisation.adam_weight_decay,
        eps=optimisation.adam_epsilon,
        **({"fused": True} if kind.is_fused else {}),
    )
    schedule = get_scheduler(
        optimisation.lr_scheduler,
        optimizer,
        num_warmup_steps=optimisation.lr_warmup_steps,
        num_training_steps=optimisation.max_train_steps,
    )
    scaler = LossScaler(parameters[0].device) if config.memory.mixed_precision == "fp16" else None
    return RoleOptimizer(parameters, optimizer, schedule, optimisation.max_grad_norm, scaler)


def load_states(optimizer: torch.optim.Optimizer, states: dict[int, dict[str, Any]]) -> None:
    """Gives an optimiser the states of its parameters, by their numbers; paged ones go into pages again."""
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in PAGED:
            page = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)  # type: ignore[attr-defined]
            state[name] = page.copy_(state[name])


def quantised_state(parts: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """torchao's tensor of 8- or 4-bit numbers, of its parts as checkpoints hold them: `codes`, `scale` and `qmap`."""
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit

    values = (parts["codes"], parts["scale"], parts["qmap"], bool((parts["qmap"] < 0).any()))
    state: Tensor = OptimState8bit(*values) if len(parts["qmap"]) > 16 else OptimState4bit(*values, shape)
    return state
