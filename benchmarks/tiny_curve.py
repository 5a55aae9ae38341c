"""How many teacher steps does it take to beat the student? Teacher and students over network calls.

    python benchmarks/tiny_curve.py --students tiny-1 tiny-2 tiny-student

Measures the teacher at 4 to 50 steps (the better of DDIM and DPM-Solver++, and DDIM alone at 50) and each student at
its own number of steps, writes `results/tiny_curve.json` and draws `docs/images/tiny_curve.png` (matplotlib).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from runs import ROOT, measure_student, write_result

from rdm_diffusers.evaluation import measure, teacher_sampler
from rdm_diffusers.evaluation.report import best_few_step_teacher
from rdm_diffusers.families import load_teacher
from rdm_diffusers.pipelines import StudentConfig
from rdm_diffusers.tiny.reference import GUIDANCE_SCALE

TEACHER_STEPS = (4, 8, 12, 16, 25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", required=True, help="students' folders")
    parser.add_argument(
        "--num_images", type=int, default=1920, help="a multiple of 240 draws every caption equally often"
    )
    args = parser.parse_args()
    teacher = load_teacher("tiny", torch.float32).pipeline
    record: dict = {"num_images": args.num_images, "guidance_scale": GUIDANCE_SCALE, "teacher": {}, "student": {}}
    for steps in TEACHER_STEPS:
        record["teacher"][steps] = best_few_step_teacher(teacher, steps, GUIDANCE_SCALE, args.num_images).as_dict()
    reference = measure(teacher_sampler(teacher, "ddim", 50, GUIDANCE_SCALE), "ddim", args.num_images)
    record["teacher"][50] = reference.as_dict()
    for folder in args.students:
        steps = StudentConfig.load(folder).num_inference_steps
        record["student"][steps] = measure_student(Path(folder), args.num_images)
    write_result("tiny_curve", record)
    draw(record, ROOT / "docs" / "images" / "tiny_curve.png")


def draw(record: dict, path: Path) -> None:
    """The distance to the teacher over network calls."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, marker in (("teacher", "o"), ("student", "s")):
        points = sorted((m["nfe"], m["fd_to_teacher"]) for m in record[name].values())
        axes.loglog(*zip(*points, strict=True), marker=marker, label=name)
    axes.set(xlabel="network calls per image", ylabel="Fréchet distance to the 50-step teacher")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
