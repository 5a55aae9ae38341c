"""What a target needs that learns the teacher's images: how many, of how many steps, how many updates, what rank.

    python benchmarks/target_study.py --work_dir target-study

Trains targets of the tiny teacher at guidance 4, as a run does, and measures what each target draws itself, unguided,
in 25 steps, against the teacher's images: `results/target_study.json`, which docs/method.md sums up. Beside it: the
same distance of the images that it learnt from. Finished targets are kept in `--work_dir`. Run it in the repository's
root.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from runs import words_of, write_result

if TYPE_CHECKING:
    from torch import Tensor

    from rdm_diffusers.training.trainer import Trainer

IMAGES, STEPS = 4800, 25  # what a target draws to be measured
FIRST_SEED = 5_000_000
BASE = dict(num_target_images=3600, target_inference_steps=25, target_train_steps=750, target_rank=64)
VARIANTS: dict[str, dict[str, int]] = {
    "3,600 images of 25 steps, 750 updates, rank 64": {},
    "6,000 images, 1,000 updates": dict(num_target_images=6000, target_train_steps=1000),
    "6,000 images": dict(num_target_images=6000),
    "1,200 images": dict(num_target_images=1200),
    "240 images": dict(num_target_images=240),
    "375 updates": dict(target_train_steps=375),
    "images of 10 steps": dict(target_inference_steps=10),
    "rank 16": dict(target_rank=16),
}


def execute(result: Path, name: str, cache: Path) -> None:
    """One target in a worker process, on one thread."""
    import torch

    from rdm_diffusers.config.command_line import parse_args
    from rdm_diffusers.training.trainer import Trainer

    torch.set_num_threads(1)
    fixed = dict(cache_dir=cache, report_to="none", num_eval_images=0, monitor_images=0)
    with tempfile.TemporaryDirectory() as folder:
        words = words_of({**BASE, **VARIANTS[name], **fixed, "output_dir": folder})
        with Trainer(parse_args(words)) as trainer:
            trainer.load()
            losses = json.loads((Path(folder) / "target.json").read_text())
            record = {"flags": {**BASE, **VARIANTS[name]}, **losses}
            record["measured"] = measure(target_images(trainer))
    result.write_text(json.dumps(record))
    print(name, record["measured"], flush=True)


def target_images(trainer: Trainer) -> Tensor:
    """What the target draws of all captions in turn `[N, 3, 32, 32]`, unguided."""
    import torch

    from rdm_diffusers.distillation import draw_samples
    from rdm_diffusers.networks import TARGET
    from rdm_diffusers.training.assembly import make_scheduler

    run, teacher = trainer.distillation, trainer.teacher
    scheduler, captions = make_scheduler(teacher, STEPS, 0.0), len(run.prompts.prompts)
    parts = []
    with torch.no_grad():
        for start in range(0, IMAGES, captions):
            generator = torch.Generator().manual_seed(FIRST_SEED + start)
            noise = torch.randn(captions, *run.latent_shape, generator=generator)
            predict = partial(run.networks.predict, TARGET)
            latents = draw_samples(predict, scheduler, [noise], run.prompts.once(range(captions)))
            parts.append(teacher.family.decode(teacher.pipeline, latents))
    return torch.cat(parts)


def measure_teacher(result: Path, steps: int) -> None:
    """Measures the teacher's own images of so many steps, in a worker process, on one thread."""
    import torch
    from study_run import teacher_images

    torch.set_num_threads(1)
    result.write_text(json.dumps(measure(teacher_images("tiny", IMAGES, 4.0, FIRST_SEED, steps))))


def measure(images: Tensor) -> dict[str, float]:
    """Distances and accuracy of images of all captions in turn."""
    from study_run import measure_images

    found = measure_images(images, "tiny", "teacher")
    return {name: found[name] for name in ("fd_to_teacher", "fd_to_data", "prompt_accuracy")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time, each on one thread")
    parser.add_argument("--work_dir", type=Path, required=True, help="images and finished targets are kept here")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    targets = {name: args.work_dir / f"target-{i}.json" for i, name in enumerate(VARIANTS)}
    steps = sorted({{**BASE, **flags}["target_inference_steps"] for flags in VARIANTS.values()})
    teachers = {each: args.work_dir / f"teacher-{each}.json" for each in steps}
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        cache, running = args.work_dir / "cache", []
        running += [pool.submit(execute, path, name, cache) for name, path in targets.items() if not path.exists()]
        running += [pool.submit(measure_teacher, path, each) for each, path in teachers.items() if not path.exists()]
        for one in running:
            one.result()
    record = {
        "num_images": IMAGES,
        "targets": {name: json.loads(path.read_text()) for name, path in targets.items()},
        "images": {each: json.loads(path.read_text()) for each, path in teachers.items()},
    }
    write_result("target_study", record)


if __name__ == "__main__":
    main()
