"""What is said of a run while it trains: its bar, its health numbers in the trackers, its alarms."""

from __future__ import annotations

import resource
import sys
import time
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..program import one_line
from .monitor import CollapseError

if TYPE_CHECKING:
    from .trainer import Trainer

SHOWN = ("reward_over_distance", "fake_loss", "log_ratio")
LOGGING_STEPS = 10  # updates between two rows of the trackers


class Progress:
    """Follows a training from the state's update on.

    Args:
        trainer: the run; its callbacks hear of each update.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.first, self.started = trainer, trainer.state.update, time.time()
        total, quiet = trainer.config.optimisation.max_train_steps, not trainer.accelerator.is_main_process
        self.bar = tqdm(total=total, initial=self.first, desc="distil", disable=quiet)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self.bar.close()

    def log(self, health: dict[str, Tensor]) -> None:
        """Takes in an update's health numbers, scalars.

        Raises:
            CollapseError: if an alarm begins to ring and the run is to stop then; earlier checkpoints stay as they are.
        """
        self.bar.update()
        self._ring(health)
        if self.trainer.state.update % LOGGING_STEPS == 0:
            self._log(health)
        if self.trainer.callbacks:
            self.trainer.notify("on_update", {name: value.item() for name, value in health.items()})

    def _ring(self, health: dict[str, Tensor]) -> None:
        """Prints the alarms that begin to ring."""
        state, accelerator = self.trainer.state, self.trainer.accelerator
        names = [name for name in health if "/step_" not in name and "/bin_" not in name]  # those every process has
        values = torch.stack([health[name].float() for name in names])
        finite = values.isfinite()  # a process without a last step, or without a valid reward, does not count
        total, count = accelerator.reduce(torch.stack([values.where(finite, 0), finite.float()]), "sum")
        alarms = state.monitor.observe(dict(zip(names, (total / count).tolist(), strict=True)))
        for alarm in alarms:
            self.bar.write(f"update {state.update}: {alarm}")
        if alarms and self.trainer.config.output.stop_on_collapse:
            raise CollapseError(
                f"Stopped after {state.update} updates (--stop_on_collapse). {alarms[0]} The last checkpoint is older."
            )

    def _log(self, health: dict[str, Tensor]) -> None:
        """Sends the health numbers to the trackers, and three of them to the bar."""
        run, state, accelerator = self.trainer.distillation, self.trainer.state, self.trainer.accelerator
        seconds = (time.time() - self.started) / (state.update - self.first)
        numbers = {name: value.item() for name, value in health.items()} | {"seconds_per_update": seconds}
        numbers["images_per_second"] = run.num_processes * len(run.groups(0)) * run.draws.group_size / seconds
        numbers["peak_memory_gib"] = peak_memory(accelerator.device) / 2**30
        numbers |= {f"network_calls/{name}": float(count) for name, count in run.networks.calls.items()}
        try:
            accelerator.log(numbers, step=state.update)
        except Exception as error:  # of whatever kind: a full disk, a server that is away
            warnings.warn(f"The trackers took no numbers ({one_line(error)}); the run goes on.", stacklevel=2)
        self.bar.set_postfix({name: f"{numbers[name]:.3g}" for name in SHOWN if name in numbers})


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of the GPU's memory, or where there is none, of the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
