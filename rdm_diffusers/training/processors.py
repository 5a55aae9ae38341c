"""How many processors this process may use: those it may run on, and of those no more than a container's quota."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # Linux control groups, and this process's


def usable_processors(groups: Path = GROUPS, own: Path = OWN_GROUPS) -> int:
    """The processors that this process may run on, at most as many as its quota of their time, rounded up.

    Args:
        groups: the folder that control groups are mounted in.
        own: the file with this process's groups.
    """
    if hasattr(os, "process_cpu_count"):  # Python 3.13's, which PYTHON_CPU_COUNT overrides
        count = os.process_cpu_count()
    else:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([count or 1, *map(math.ceil, _quotas(groups, own))]))


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """The quotas of this process's control groups and of those above them, in processors."""
    lines: list[str] = []
    with suppress(OSError):  # not on Linux
        lines = own.read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # The second version has all controllers in one place; in the first each has a folder.
        mount = groups / controllers
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):  # a container may not see its group's path, but sees the top
                yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    """A group's quota in processors, if it has one."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()  # `max` is no quota, and no number
        yield int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:  # -1 is no quota
            yield int(quota) / int(period)
