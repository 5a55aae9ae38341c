"""The logs of a run: the trackers that `--report_to` names."""

from __future__ import annotations

import warnings

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from ..config import RunConfig
from ..program import one_line


def check_trackers(report_to: str) -> None:
    """Refuses a tracker that accelerate would leave out without a word.

    Raises:
        ImportError: if its package is missing.
    """
    installed = [str(one) for one in get_available_trackers()]
    if report_to == "none" or report_to in installed or (report_to == "all" and installed):
        return
    raise ImportError(
        f"--report_to {report_to} needs a package that is not installed, so that the run would have no logs: "
        "pip install 'rdm-diffusers[track]' or the tracker's own, or leave the logs out with --report_to none."
    )


def start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    """Opens the logs, with the run's configuration.

    Raises:
        ValueError: if a tracker cannot start, for example because nobody is logged in.
    """
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
    """Closes the logs, and the other processes' share; a tracker that fails now takes nothing with it."""
    try:
        accelerator.end_training()
    except Exception as error:
        warnings.warn(f"The trackers could not be closed ({one_line(error)}); the run goes on.", stacklevel=2)
