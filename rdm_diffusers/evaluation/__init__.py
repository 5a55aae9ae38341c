"""Distances, accuracies and pictures of students and teachers."""

from .metrics import Metrics, evaluation_prompts, measure, measure_images
from .report import as_table, save_samples, student_sampler, tiny_metrics, write_metrics
from .samplers import TEACHER_SOLVERS, Sampler, teacher_sampler

__all__ = [
    "TEACHER_SOLVERS",
    "Metrics",
    "Sampler",
    "as_table",
    "evaluation_prompts",
    "measure",
    "measure_images",
    "save_samples",
    "student_sampler",
    "teacher_sampler",
    "tiny_metrics",
    "write_metrics",
]
