"""What full weights gain over LoRAs, and what 8-bit Adam costs, on the tiny teacher over several seeds.

    python benchmarks/training_modes.py --work_dir training-modes

Writes `results/training_modes.json`: each mode's distances after as many updates as its rival, per seed and on average.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from runs import train, words_of, write_result

COMMON = words_of(
    dict(
        teacher_target="score",
        report_to="none",
        monitor_images=0,
        validation_steps=100_000,
        checkpointing_steps=100_000,
    )
)
LORA, FULL = "train_rdm_lora.py", "train_rdm_full.py"
MODES: dict[str, tuple[str, list[str]]] = {
    "lora": (LORA, ["--max_train_steps", "400"]),
    "full": (FULL, ["--max_train_steps", "400"]),
    "lora_200": (LORA, ["--max_train_steps", "200"]),
    "lora_200_8bit": (LORA, ["--max_train_steps", "200", "--use_8bit_adam"]),
    "full_200": (FULL, ["--max_train_steps", "200"]),
    "full_200_8bit": (FULL, ["--max_train_steps", "200", "--use_8bit_adam"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, required=True, help="holds the runs; finished ones are not run again")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--num_images", type=int, default=1920, help="a multiple of 240 draws every caption equally often"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    args = parser.parse_args()

    def run(job: tuple[str, int]) -> float:
        mode, seed = job
        script, flags = MODES[mode]
        own = ["--seed", str(seed), "--num_eval_images", str(args.num_images)]
        metrics = train(args.work_dir / f"{mode}-{seed}", [*COMMON, *flags, *own], threads=1, script=script)
        return metrics["student"]["fd_to_teacher"]

    jobs = [(mode, seed) for seed in range(args.seeds) for mode in MODES]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(jobs, pool.map(run, jobs), strict=True))
    table = {}
    for mode, (script, flags) in MODES.items():
        distances = [found[mode, seed] for seed in range(args.seeds)]
        spread = stdev(distances) if len(distances) > 1 else None
        measured = {"fd_to_teacher": distances, "mean": mean(distances), "std": spread}
        table[mode] = {"script": script, "flags": flags, **measured}
    write_result("training_modes", {"num_images": args.num_images, "modes": table})


if __name__ == "__main__":
    main()
