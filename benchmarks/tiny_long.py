"""The main job, longer: `python benchmarks/tiny_long.py --work_dir /tmp/tiny_long`."""

from __future__ import annotations

import argparse
from pathlib import Path

from runs import train, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max_train_steps", type=int, default=3500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work_dir", type=Path, required=True, help="where the run goes; it is resumed from there")
    args = parser.parse_args()
    flags = ["--max_train_steps", str(args.max_train_steps), "--report_to", "none"]
    write_result("tiny_long", train(args.work_dir, flags, args.threads))


if __name__ == "__main__":
    main()
