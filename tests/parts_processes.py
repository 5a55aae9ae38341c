"""Two processes of one run, forked from the test, so that they import nothing anew."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable

from accelerate.state import AcceleratorState, GradientState

# FORK_LAUNCHED has accelerate leave the group of processes as it is where a run ends, for the next run.
QUIET = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "FORK_LAUNCHED": "1"}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def in_two_processes(work: Callable[[], object], **environment: str) -> None:
    """Runs `work` in two processes that see each other as those of one launch do; both must end well.

    Args:
        work: what each of them does.
        environment: what is set for it, beside what torchrun sets.
    """
    port = str(free_port())
    children = [_fork(work, {**QUIET, **environment, "MASTER_PORT": port}, rank) for rank in range(2)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert statuses == [0, 0]


def _fork(work: Callable[[], object], environment: dict[str, str], rank: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(environment | {name: str(value) for name, value in places.items()})
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
