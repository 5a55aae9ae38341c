"""The configuration of a run: its subjects together, from flags, a YAML file, Python or a checkpoint's record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..bounds import did_you_mean
from ..families import Lora
from ..rewards import is_function, split_function
from ..untrusted import INSTEAD, check_kinds, has_secret
from .checks import check
from .fields import Setting, settings_of
from .presets import DERIVED, EPOCHS, UPDATES, below, filled
from .refused import REFUSED, refusal
from .retired import without_retired
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

STUDENTS = {"lora": LoraStudentConfig, "full": FullStudentConfig}
# What a checkpoint records of a run beside its configuration.
CIRCUMSTANCES = ("command", "num_processes", "prompts_sha256", "loras_sha256", "images_sha256", "file_sha256")
ONE_TIME = ("resume_from_checkpoint", "dry_run")  # no part of what a file repeats


@dataclass(frozen=True)
class RunConfig:
    """A run's configuration; make one with `RunConfig.of`, which fills in and checks.

    Args:
        teacher, prompts, target, method, times, rewards, student, optimisation, memory, output, validation,
            hub: the subjects.
        command: the command line that it came from, as others may see it; None where there was none.
    """

    teacher: TeacherConfig
    prompts: PromptsConfig
    target: TargetConfig
    method: MethodConfig
    times: TimesConfig
    rewards: RewardsConfig
    student: LoraStudentConfig | FullStudentConfig
    optimisation: OptimisationConfig
    memory: MemoryConfig
    output: OutputConfig
    validation: ValidationConfig
    hub: HubConfig
    command: str | None = None

    @classmethod
    def of(cls, student: str = "lora", **values: Any) -> RunConfig:
        """A configuration from values by the flags' names; defaults for all others.

        Args:
            student: `lora` or `full`.
            values: by the flags' names or aliases; None leaves a default.

        Raises:
            ValueError, ImportError: one sentence on what is wrong and what to do.
        """
        for name, value in values.items():
            if has_secret(str(value)):
                raise ValueError(f"{name} holds what looks like a password or a token, which a run records; {INSTEAD}.")
        config = cls._unchecked(student, **values)
        check(config)
        return config

    @classmethod
    def from_yaml(cls, path: str | Path, student: str | None = None, **values: Any) -> RunConfig:
        """A configuration from a file of flags' names and values, as every run writes it (`config.yaml`).

        Args:
            path: the file.
            student: `lora` or `full`, if the file must be of a run of this kind.
            values: by the flags' names; they go before the file's.

        Raises:
            ValueError, ImportError: one sentence on what is wrong and what to do.
        """
        settings = read_yaml(path)
        kind = settings.pop("student", student or "lora")
        if kind not in STUDENTS or student not in (None, kind):
            wanted = student or "lora or full"
            raise ValueError(f"{path} configures a student of kind {kind}, which is not {wanted}; use another file.")
        names = _by_names(kind)
        on_top = {_setting(name, names).name for name, value in values.items() if value is not None}
        rest = {name: value for name, value in settings.items() if _setting(name, names, path).name not in on_top}
        return cls.of(kind, **below(rest, on_top), **values)

    @classmethod
    def from_record(cls, arguments: Mapping[str, Any]) -> RunConfig:
        """The configuration of the run that recorded these arguments, of this release or an older one.

        Args:
            arguments: as `as_arguments` gives them.

        Raises:
            RetiredError: if a value belongs to an option that was retired.
            ValueError: if one is out of its bounds, or of another type.
        """
        values = {name: value for name, value in without_retired(arguments).items() if name not in CIRCUMSTANCES}
        student = values.pop("student", "lora" if "rank" in values else "full")
        if student not in STUDENTS:
            raise ValueError(f"student is {student}; it must be lora or full.")
        check_kinds(values, {each.name: each.kinds for each in all_settings(student)}, "argument ")
        return cls._unchecked(student, **values)

    @classmethod
    def _unchecked(cls, student: str, **values: Any) -> RunConfig:
        """Checks that each value is within its bounds, and fills in the others, but not whether they go together."""
        names = _by_names(student)
        given: dict[str, Any] = {}
        for name, value in values.items():
            setting = _setting(name, names)
            if value is not None:
                given[setting.name] = setting.checked(value)
        whole = filled(student, given, {setting.name: setting.default for setting in names.values()})
        kinds = subjects_of(student).items()
        return cls(**{name: kind(**{each.name: whole[each.name] for each in fields(kind)}) for name, kind in kinds})

    @property
    def is_lora(self) -> bool:
        """Whether the student is a LoRA."""
        return isinstance(self.student, LoraStudentConfig)

    @property
    def fold_adapters(self) -> bool:
        """Whether adapters are folded into the base's weights; a full student has none."""
        return isinstance(self.student, LoraStudentConfig) and self.student.fold_adapters

    @property
    def student_base(self) -> str:
        """What an exported LoRA is for: the teacher without its LoRAs (`plain`), or the `teacher` with them."""
        return self.student.student_base if isinstance(self.student, LoraStudentConfig) else "plain"

    @property
    def loras(self) -> list[Lora]:
        """The LoRAs that the run begins with: the teacher's, then the student's."""
        start = self.student.init_lora if isinstance(self.student, LoraStudentConfig) else None
        return [Lora.parse(each) for each in (*self.teacher.teacher_lora, *([start] if start else []))]

    def changed(self, subject: str, **values: Any) -> RunConfig:
        """A copy with other values of one subject, unchecked."""
        return replace(self, **{subject: replace(getattr(self, subject), **values)})

    def as_arguments(self) -> dict[str, Any]:
        """All values by their fields' names, as JSON has them; what checkpoints and records hold."""
        subjects = [getattr(self, name) for name in subjects_of(self.student.kind)]
        values = {each.name: getattr(subject, each.name) for subject in subjects for each in fields(subject)}
        lists = {name: list(value) or None for name, value in values.items() if isinstance(value, tuple)}
        return {"student": self.student.kind, **values, **lists}

    def as_yaml(self) -> str:
        """A file that starts the same run again; it leaves out what follows from the rest.

        So a value that is put on top of it, for example another rank, brings its own consequences.
        """
        values = self.as_arguments()
        if values[EPOCHS] is not None:
            del values[UPDATES]  # which would override it
        rest = {name: value for name, value in values.items() if name not in (*DERIVED, *ONE_TIME)}
        derived = RunConfig._unchecked(**rest).as_arguments()
        written = {name: value for name, value in values.items() if name in rest or value != derived[name]}
        lines = [f"# Starts this run again: {self._start}", f"student: {self.student.kind}"]
        for subject, kind in subjects_of(self.student.kind).items():
            named = {
                each.names[0]: written[each.name] for each in settings_of(kind) if written.get(each.name) is not None
            }
            if named:
                lines += ["", f"# {subject}", yaml.safe_dump(named, sort_keys=False, allow_unicode=True).rstrip()]
        return "\n".join(lines) + "\n"

    @property
    def _start(self) -> str:
        """What starts a run with a file of its settings."""
        functions = [split_function(spec)[0] for spec in self.rewards.reward if is_function(spec)]
        if functions:
            return f"Trainer(RunConfig.from_yaml(THIS_FILE), reward_funcs=[{', '.join(functions)}])"
        return f"accelerate launch train_rdm_{self.student.kind}.py --config THIS_FILE"


def subjects_of(student: str) -> dict[str, type]:
    """The subjects of a run of a LoRA or a full student, by their names in a `RunConfig`."""
    return {
        "teacher": TeacherConfig, "prompts": PromptsConfig, "target": TargetConfig, "method": MethodConfig,
        "times": TimesConfig, "rewards": RewardsConfig, "student": STUDENTS[student],
        "optimisation": OptimisationConfig, "memory": MemoryConfig, "output": OutputConfig,
        "validation": ValidationConfig, "hub": HubConfig,
    }  # fmt: skip


def all_settings(student: str | None = None) -> Iterator[Setting]:
    """Every setting of a kind of student, or of both."""
    for kind in STUDENTS if student is None else (student,):
        for subject in subjects_of(kind).values():
            yield from settings_of(subject)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """What a file of settings holds; ValueError if it cannot be read, or holds anything else than names with values."""
    try:
        settings = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"--config {path} cannot be read ({reason}); give a YAML file of flags and values.") from error
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ValueError(
            f"--config {path} holds no flags; give a YAML file of flags and values, `rank: 32` for example."
        )
    return settings


def _by_names(student: str) -> dict[str, Setting]:
    """Every setting by each name of its flag, and by its field's."""
    if student not in STUDENTS:
        raise ValueError(f"The student is {student}; it must be lora or full.")
    settings = list(all_settings(student))
    return {name: each for each in settings for name in (each.name, *each.names)}


def _setting(name: str, names: Mapping[str, Setting], path: str | Path | None = None) -> Setting:
    if name in REFUSED:
        raise ValueError(refusal(name))
    if name not in names:
        where = "" if path is None else f" in {path}"
        raise ValueError(f"There is no setting {name}{where}{did_you_mean(name, names)}; --help lists all flags.")
    return names[name]
