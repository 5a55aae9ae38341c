"""Distances, accuracies and pictures of students and teachers."""

from ..frechet import Distance, distance_with_interval
from .features import FEATURES, Features, Reference, load_features, load_reference, save_reference
from .prompt_sets import PROMPT_SETS, load_prompt_set
from .records import compare
from .report import (
    Metrics,
    as_table,
    evaluation_prompts,
    measure,
    measure_images,
    save_samples,
    tiny_metrics,
    write_metrics,
)
from .subjects import FLOW_SOLVERS, TEACHER_SOLVERS, Sampler, put, solvers_of, student_sampler, teacher_sampler

__all__ = [
    "FEATURES",
    "FLOW_SOLVERS",
    "PROMPT_SETS",
    "TEACHER_SOLVERS",
    "Distance",
    "Features",
    "Metrics",
    "Reference",
    "Sampler",
    "as_table",
    "compare",
    "distance_with_interval",
    "evaluation_prompts",
    "load_features",
    "load_prompt_set",
    "load_reference",
    "measure",
    "measure_images",
    "put",
    "save_reference",
    "save_samples",
    "solvers_of",
    "student_sampler",
    "teacher_sampler",
    "tiny_metrics",
    "write_metrics",
]
