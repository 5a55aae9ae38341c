"""A student that draws the user's own images: another handwriting, bold and slanted, than its tiny teacher knows.

    python benchmarks/own_images.py --work_dir own-images

Writes 2,400 images with captions, trains a student of the teacher alone and one whose target are these images, for as
many updates, and measures both against fresh images of that handwriting: `results/own_images.json`, and the picture
`docs/images/own_images.png`. An interrupted run goes on. It takes about 10 minutes on one free core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from runs import ROOT, train, words_of, write_result
from torch import Tensor

from rdm_diffusers.evaluation import evaluation_prompts, student_sampler, teacher_sampler
from rdm_diffusers.evaluation.pictures import labelled_rows, to_pil
from rdm_diffusers.families import load_teacher
from rdm_diffusers.frechet import GaussianStatistics, frechet_distance
from rdm_diffusers.pipelines import RdmDistillationPipeline
from rdm_diffusers.tiny.captions import CAPTIONS, DRAWINGS, parse_caption
from rdm_diffusers.tiny.classifier import load_classifier
from rdm_diffusers.tiny.handwriting import Handwriting
from rdm_diffusers.tiny.reference import GUIDANCE_SCALE, load_statistics

SLANT, THRESHOLD = 0.4, 0.3  # the teacher's handwriting has 0 and 0.42
SHOWN = range(7, 240, 30)  # captions of the picture
FIRST_SEED = 1_000_000


class OtherHandwriting(Handwriting):
    """The same scans, bold and slanted."""

    def _strokes(self, scans: Tensor) -> Tensor:
        upright = F.interpolate(scans, scale_factor=4, mode="bicubic")
        affine = torch.zeros(len(scans), 2, 3)
        affine[:, 0, 0] = affine[:, 1, 1] = 1.2
        affine[:, 0, 1] = SLANT * 1.2
        affine[:, :, 2] = (torch.rand(len(scans), 2, generator=self.generator) * 2 - 1) / 8
        grid = F.affine_grid(affine, list(upright.shape), align_corners=False)
        return torch.sigmoid((F.grid_sample(upright, grid, align_corners=False) - THRESHOLD) * 12)


def drawn(count: int, seed: int) -> Tensor:
    """Images of all captions in turn `[N, 3, 32, 32]`."""
    handwriting = OtherHandwriting(torch.Generator().manual_seed(seed))
    return handwriting.draw([DRAWINGS[i % len(DRAWINGS)] for i in range(count)])


def write_images(folder: Path, count: int) -> None:
    """An imagefolder with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"file_name": f"{i:05}.png", "text": CAPTIONS[i % len(CAPTIONS)]} for i in range(count)]
    for row, image in zip(rows, drawn(count, seed=0), strict=True):
        to_pil(image).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="where images and students go")
    parser.add_argument("--num_own_images", type=int, default=2400)
    parser.add_argument("--num_images", type=int, default=2400, help="that are measured")
    parser.add_argument("--max_train_steps", type=int, default=200, help="of both students")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = args.work_dir / "images"
    if not (images / "metadata.jsonl").exists():
        write_images(images, args.num_own_images)
    plain = {
        "max_train_steps": args.max_train_steps, "validation_steps": 10_000, "report_to": "none", "num_eval_images": 0,
        "checkpointing_steps": 50, "cache_dir": args.work_dir / "cache", "train_batch_size": 64, "ema_decay": 0.99,
        "learning_rate": 2.5e-4, "lr_scheduler": "cosine",
    }  # fmt: skip
    own = {**plain, "teacher_target": "samples", "train_data_dir": images, "target_train_steps": 400}
    classifier, references = load_classifier(), load_statistics()
    others = GaussianStatistics.of(classifier.features(drawn(4800, seed=1)))

    def measured(pictures: Tensor) -> dict[str, float]:
        statistics = GaussianStatistics.of(classifier.features(pictures))
        correct = classifier.correct(pictures, [parse_caption(p) for p in evaluation_prompts(len(pictures))])
        return {
            "fd_to_own_images": frechet_distance(statistics, others),
            "fd_to_teacher": frechet_distance(statistics, references["teacher"]),
            "prompt_accuracy": correct["all"].float().mean().item(),
        }

    prompts, shown = [CAPTIONS[i] for i in SHOWN], drawn(240, seed=2)[list(SHOWN)]
    teacher = teacher_sampler(load_teacher("tiny", torch.float32).pipeline, "ddim", 50, GUIDANCE_SCALE)
    rows = {"your images": shown, "teacher: 50 steps": teacher(prompts, range(len(prompts)))[0]}
    record: dict = {"num_own_images": args.num_own_images, "num_images": args.num_images}
    record["own_images"] = measured(drawn(args.num_images, seed=3))
    record["teacher"] = {"fd_to_own_images": frechet_distance(references["teacher"], others)}
    for name, flags in {"student_of_own_images": own, "plain_student": plain}.items():
        train(args.work_dir / name, words_of(flags), args.threads)
        student = student_sampler(RdmDistillationPipeline.from_pretrained(args.work_dir / name))
        seeds = range(FIRST_SEED, FIRST_SEED + args.num_images)
        record[name] = measured(student(evaluation_prompts(args.num_images), seeds)[0])
        rows[f"{name.replace('_', ' ')}: 4 steps"] = student(prompts, range(len(prompts)))[0]
    record["target"] = json.loads((args.work_dir / "student_of_own_images" / "target.json").read_text())
    labelled_rows(rows).save(ROOT / "docs" / "images" / "own_images.png")
    write_result("own_images", record)


if __name__ == "__main__":
    main()
