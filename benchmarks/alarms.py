"""Do alarms come before the images are ruined? Runs that are driven into collapse, beside healthy ones.

    python benchmarks/alarms.py --work_dir alarms

Writes `results/alarms.json`: for every run its alarms with their updates, and the quality over its updates.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from method_study import execute
from runs import write_result

TEACHERS = ("tiny", "tiny-flow")
HEALTHY = dict(algorithm="gndm", guidance_scale=2.0, monitor_images=16)
RUNS = {
    "healthy gndm": HEALTHY,
    "healthy dmd": dict(HEALTHY, algorithm="dmd"),
    "healthy gndmr": dict(HEALTHY, algorithm="gndmr", reward="tiny_bold", reward_share=0.1),
    "no fake updates": dict(HEALTHY, fake_updates_per_step=0),
    "dmd without fake updates": dict(HEALTHY, algorithm="dmd", fake_updates_per_step=0),
    "learning rate x 50": dict(HEALTHY, learning_rate=5e-2, fake_learning_rate=1e-3),
    "reward share .99": dict(HEALTHY, algorithm="gndmr", reward="tiny_bold", reward_share=0.99),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--budget", type=int, default=40_000, help="network calls of each run")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work_dir", type=Path, required=True, help="finished runs are kept here")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    paths = {
        (teacher, name): args.work_dir / f"{teacher}-{name.replace(' ', '-')}.json"
        for teacher in args.teachers
        for name in RUNS
    }
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for (teacher, name), path in paths.items():
            if not path.exists():
                pool.submit(execute, path, teacher, 0, args.budget, 8, 480, RUNS[name])
    record: dict = {teacher: {} for teacher in args.teachers}
    for (teacher, name), path in paths.items():
        run = json.loads(path.read_text())
        quality = [
            {key: point[key] for key in ("updates", "fd_to_teacher", "prompt_accuracy", "tiny_bold")}
            for point in run["curve"]
        ]
        record[teacher][name] = {"flags": RUNS[name], "alarms": run["alarms"], "quality": quality}
    write_result("alarms", record)


if __name__ == "__main__":
    main()
