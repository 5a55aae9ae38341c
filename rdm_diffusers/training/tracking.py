"""What a run reports while it trains: its trackers (`--report_to`), its progress bar and its alarms."""

from __future__ import annotations

import resource
import sys
import time
import warnings
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor
from tqdm.auto import tqdm

from ..config import RunConfig
from ..hardware import to_float64
from ..program import one_line
from ..report.rows import HEALTH_FILE, append_row, read_rows, write_rows
from .loss_scaling import scaling_health
from .monitor import CollapseError

if TYPE_CHECKING:
    from .trainer import Trainer

SHOWN = ("reward_over_distance", "consistency_loss", "fake_loss", "log_ratio", "overflows")


def announcement(config: RunConfig, num_processes: int) -> str:
    """What is trained, from what, and where it goes, in a sentence."""
    method, updates = config.method, config.optimisation.max_train_steps
    student = f"{method.num_student_steps}-step {'LoRA student' if config.is_lora else 'student of full weights'}"
    return (
        f"Distilling {config.teacher.pretrained_model_name_or_path} into a {student} in {config.output.output_dir}: "
        f"{method.algorithm.replace('_', '-').upper()}, {updates} updates of "
        f"{config.optimisation.samples_per_update * num_processes} samples."
    )


def check_trackers(report_to: str) -> None:
    """Raises ImportError for a tracker whose package is missing, which accelerate would leave out without a word."""
    installed = [str(one) for one in get_available_trackers()]
    if report_to == "none" or report_to in installed or (report_to == "all" and installed):
        return
    raise ImportError(
        f"--report_to {report_to} needs a package that is not installed, so that the run would have no logs: "
        "pip install 'rdm-diffusers[track]' or the tracker's own, or leave the logs out with --report_to none."
    )


def start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    """Opens the logs, with the run's configuration; ValueError if a tracker cannot, as where nobody is logged in."""
    output, values = config.output, config.as_arguments()
    plain = {name: value for name, value in values.items() if isinstance(value, int | float | str)}
    try:
        accelerator.init_trackers(output.tracker_project_name, config=plain)
    except Exception as error:  # each tracker has errors of its own
        raise ValueError(
            f"--report_to {output.report_to} cannot start ({one_line(error)}); fix that, or leave the logs out with "
            "--report_to none."
        ) from error


def end_trackers(accelerator: Accelerator) -> None:
    """Closes the logs; an error of a tracker becomes a warning.

    Not by `Accelerator.end_training`, which also ends the group of processes, that sharded weights are exported with.
    """
    try:
        for tracker in accelerator.trackers:
            tracker.finish()
    except Exception as error:
        warnings.warn(f"The trackers could not be closed ({one_line(error)}); the run goes on.", stacklevel=2)


class Progress:
    """Reports on a training from the state's update on."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.first, self.started = trainer, trainer.state.update, time.time()
        total, quiet = trainer.config.optimisation.max_train_steps, not trainer.accelerator.is_main_process
        self.health_file = trainer.folder / trainer.config.output.logging_dir / HEALTH_FILE
        if trainer.accelerator.is_main_process:
            write_rows(self.health_file, read_rows(self.health_file, until=self.first))
        self.bar = tqdm(total=total, initial=self.first, desc="distil", disable=quiet)

    def log(self, health: dict[str, Tensor]) -> None:
        """Takes in an update's health numbers, scalars.

        Raises:
            CollapseError: if an alarm begins to ring and the run is to stop then; earlier checkpoints stay as they are.
        """
        self.bar.update()
        alarms = self._observe(health)
        numbers = {}
        if self.trainer.state.update % self.trainer.config.output.logging_steps == 0:
            numbers = self._log_numbers(health)
        self._keep(numbers, alarms)
        if alarms and self.trainer.config.output.stop_on_collapse:
            raise CollapseError(
                f"Stopped after {self.trainer.state.update} updates (--stop_on_collapse). {alarms[0]} The last "
                "checkpoint is older."
            )
        if self.trainer.callbacks:
            self.trainer.notify("on_update", numbers_of(health))

    def _observe(self, health: dict[str, Tensor]) -> list[str]:
        """Shows the alarms that begin to ring now, and returns them."""
        state, accelerator = self.trainer.state, self.trainer.accelerator
        names = [name for name in health if "/step_" not in name and "/bin_" not in name]  # those every process has
        device = self.trainer.distillation.draws.device  # some are on the CPU where the device has no float64
        values = torch.stack([health[name].float().to(device) for name in names])
        finite = values.isfinite()  # a process without a last step, or without a valid reward, does not count
        total, count = accelerator.reduce(torch.stack([values.where(finite, 0), finite.float()]), "sum")
        alarms = state.monitor.observe(dict(zip(names, (total / count).tolist(), strict=True)))
        for alarm in alarms:
            self.bar.write(f"update {state.update}: {alarm}")
        return alarms

    def _keep(self, numbers: dict[str, float], alarms: list[str]) -> None:
        """Adds a row to the file of health numbers, on the main process."""
        if (numbers or alarms) and self.trainer.accelerator.is_main_process:
            row = {"update": self.trainer.state.update, **numbers, **({"alarms": alarms} if alarms else {})}
            append_row(self.health_file, row)

    def _log_numbers(self, health: dict[str, Tensor]) -> dict[str, float]:
        run, state, accelerator = self.trainer.distillation, self.trainer.state, self.trainer.accelerator
        seconds = (time.time() - self.started) / (state.update - self.first)
        numbers = numbers_of(health) | {"seconds_per_update": seconds}
        numbers["images_per_second"] = run.num_processes * len(run.groups(0)) * run.draws.group_size / seconds
        numbers["peak_memory_gib"] = peak_memory(accelerator.device) / 2**30
        optimizers = state.optimizers.items()
        numbers |= {f"learning_rate/{role}": float(each.optimizer.param_groups[0]["lr"]) for role, each in optimizers}
        numbers |= scaling_health(state.optimizers)
        numbers |= {f"network_calls/{name}": float(count) for name, count in run.networks.calls.items()}
        log_numbers(accelerator, numbers, state.update)
        self.bar.set_postfix({name: f"{numbers[name]:.3g}" for name in SHOWN if name in numbers})
        return numbers


def log_numbers(accelerator: Accelerator, numbers: dict[str, float], update: int) -> None:
    """Gives numbers to the trackers; an error becomes a warning."""
    try:
        accelerator.log(numbers, step=update)
    except Exception as error:  # of whatever kind: a full disk, a server that is away
        warnings.warn(f"The trackers took no numbers ({one_line(error)}); the run goes on.", stacklevel=2)


def numbers_of(health: dict[str, Tensor]) -> dict[str, float]:
    """Health numbers, read from the device at once; those of empty bins are left out."""
    values = torch.stack([to_float64(value) for value in health.values()]).tolist()
    return {name: value for name, value in zip(health, values, strict=True) if "/bin_" not in name or value == value}


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of the GPU's memory, or where there is none, of the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
