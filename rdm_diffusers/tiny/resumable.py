"""A long training on a CPU that can be interrupted at any time: it continues exactly from its last saved state."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..folders import aside_of

WARMUP = 500  # steps
DECAY = 3000  # last steps, in which the learning rate falls to 0
EMA_DECAY = 0.9995


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Constant but for its ends, so that the choice of `steps` matters only in the last `DECAY` of them."""
    return peak * min(1.0, (step + 1) / WARMUP, (steps - step) / DECAY)


class ResumableTraining:
    """AdamW, a moving average of the parameters, and a file of both.

    Args:
        parameters: what is trained; they hold the file's values, if there is one.
        path: the file of the state.
        save_every: steps between two states.
    """

    def __init__(self, parameters: list[nn.Parameter], path: Path, save_every: int = 500) -> None:
        self.parameters, self.path, self.save_every, self.step = parameters, path, save_every, 0
        self.optimizer = torch.optim.AdamW(parameters, weight_decay=1e-4, fused=True)
        self.averages = [parameter.detach().clone() for parameter in parameters]
        if path.exists():
            self._load()

    def run(self, loss_of: Callable[[int], Tensor], steps: int, peak: float) -> None:
        """Trains up to `steps` steps; `loss_of(step)` may draw random numbers that depend on the step alone."""
        started, running = time.time(), 0.0
        while self.step < steps:
            self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, steps, peak)
            loss = loss_of(self.step)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(EMA_DECAY, self.step / (self.step + 10))
            torch._foreach_lerp_(self.averages, [each.detach() for each in self.parameters], 1 - decay)
            running = 0.99 * running + 0.01 * loss.item() if running else loss.item()
            if self.step % self.save_every == 0 or self.step == steps:
                self._save()
                print(f"step {self.step}/{steps} loss {running:.4f} {time.time() - started:.0f} s", flush=True)

    def copy_averages(self) -> None:
        """Gives the parameters the values of their moving averages."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.data.copy_(average)

    def _save(self) -> None:
        tensors = {"step": torch.tensor(self.step)}
        for i, (parameter, average) in enumerate(zip(self.parameters, self.averages, strict=True)):
            state = self.optimizer.state[parameter]
            tensors |= {f"parameter.{i}": parameter.detach(), f"average.{i}": average}
            tensors |= {f"{name}.{i}": state[name] for name in ("exp_avg", "exp_avg_sq")}
        save_file(tensors, aside_of(self.path))
        aside_of(self.path).replace(self.path)

    def _load(self) -> None:
        tensors = load_file(self.path)
        self.step = int(tensors["step"])
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors[f"parameter.{i}"])
            self.averages[i].copy_(tensors[f"average.{i}"])
            moments = {name: tensors[f"{name}.{i}"] for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
