"""The typed configuration of a run; flags, YAML files and records are made from it."""

from .run_config import RunConfig, all_settings
from .students import FullStudentConfig, LoraStudentConfig
from .subjects import (
    HubConfig,
    MemoryConfig,
    MethodConfig,
    OptimisationConfig,
    OutputConfig,
    PromptsConfig,
    RewardsConfig,
)
from .target import TargetConfig
from .teacher import TeacherConfig
from .times import TimesConfig
from .validation import ValidationConfig

__all__ = [
    "FullStudentConfig", "HubConfig", "LoraStudentConfig", "MemoryConfig", "MethodConfig", "OptimisationConfig",
    "OutputConfig", "PromptsConfig", "RewardsConfig", "RunConfig", "TargetConfig", "TeacherConfig", "TimesConfig",
    "ValidationConfig", "all_settings",
]  # fmt: skip
