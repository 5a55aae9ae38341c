"""Distances, accuracies and pictures of students and teachers."""

from .features import FEATURES, Features, load_features
from .intervals import Distance, distance_with_interval
from .prompt_sets import PROMPT_SETS, load_prompt_set
from .records import compare
from .references import Reference, load_reference, save_reference
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
from .samplers import FLOW_SOLVERS, TEACHER_SOLVERS, Sampler, solvers_of, student_sampler, teacher_sampler
from .subjects import put

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
