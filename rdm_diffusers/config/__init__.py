"""The typed configuration of a run; flags, YAML files and records are made from it."""

from .fields import settings_of
from .run_config import CIRCUMSTANCES, RunConfig, all_settings
from .subjects import (
    FullStudentConfig,
    HubConfig,
    LoraStudentConfig,
    MemoryConfig,
    MethodConfig,
    OptimisationConfig,
    OutputConfig,
    PromptsConfig,
    RewardsConfig,
    TeacherConfig,
)

__all__ = [
    "CIRCUMSTANCES", "FullStudentConfig", "HubConfig", "LoraStudentConfig", "MemoryConfig", "MethodConfig",
    "OptimisationConfig", "OutputConfig", "PromptsConfig", "RewardsConfig", "RunConfig", "TeacherConfig",
    "all_settings", "settings_of",
]  # fmt: skip
