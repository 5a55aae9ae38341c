"""Distances, accuracies and pictures of students and teachers."""

from .metrics import Metrics, evaluation_prompts, measure, measure_images
from .report import as_table, save_samples, student_sampler, tiny_metrics, write_metrics
from .samplers import FLOW_SOLVERS, TEACHER_SOLVERS, Sampler, solvers_of, teacher_sampler

__all__ = [
    "FLOW_SOLVERS",
    "TEACHER_SOLVERS",
    "Metrics",
    "Sampler",
    "as_table",
    "evaluation_prompts",
    "measure",
    "measure_images",
    "save_samples",
    "solvers_of",
    "student_sampler",
    "teacher_sampler",
    "tiny_metrics",
    "write_metrics",
]
