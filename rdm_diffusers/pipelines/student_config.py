"""`rdm_config.json`: how a student is loaded and sampled; damaged or hostile files are refused before loading."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..families import STUDENT_CONFIG, Lora, SingleFile, check_no_checkpoint, fetch
from ..folders import ASIDE
from ..sizes import BUCKETS, RESOLUTION, in_words, read_buckets
from ..untrusted import Kinds, check_kinds, described, digest_of, is_kind, read_object

DIGEST = "digest"
FORMAT_VERSION = 2  # raised only when older releases would sample a student wrongly, or call it damaged
FIRST_VERSION = 1  # of students that every release reads
MOST_LORAS = 16
REMEDY = "download or export the student again"
TEXT: Kinds = (str, type(None))
STUDENT_KINDS: dict[str, Kinds] = {
    "base_model_name_or_path": TEXT, "pipeline_class": str, "scheduler": dict, "num_inference_steps": int,
    "call_arguments": dict, "revision": TEXT, "variant": TEXT, "vae": TEXT, "license": dict, "training": dict,
    "weights_sha256": TEXT, "scheduler_sha256": TEXT, "version": TEXT, "format_version": int, "base_loras": list,
    "base_file": (dict, type(None)),
}  # fmt: skip
TRAINING_KINDS: dict[str, Kinds] = {
    "command": TEXT, "arguments": dict, "updates": (int, type(None)), "averaged": (bool, type(None)),
}  # fmt: skip
ARGUMENT_KINDS: dict[str, Kinds] = {  # of the arguments that code reads
    "pretrained_model_name_or_path": TEXT, "single_file_config": TEXT, "student": TEXT, "algorithm": TEXT,
    "reward": (list, type(None)), "resolution": (int, str, type(None)), "train_batch_size": (int, type(None)),
    "num_processes": (int, type(None)), "gradient_accumulation_steps": (int, type(None)),
    "teacher_lora": (list, type(None)), "init_lora": TEXT, "aspect_ratio_buckets": TEXT,
}  # fmt: skip
FILE_KINDS: dict[str, Kinds] = {"config": str, "sha256": str, "parts": list}
LORA_KINDS: dict[str, Kinds] = {"name": str, "scale": float, "sha256": str}
SCHEDULER_KINDS: dict[str, Kinds] = {
    "_class_name": str, "num_train_timesteps": int, "beta_start": float, "beta_end": float, "beta_schedule": str,
    "trained_betas": (list, type(None)), "rescale_betas_zero_snr": bool, "prediction_type": str, "eta": float,
    "student_timesteps": (list, type(None)), "student_sigmas": (list, type(None)), "timestep_spacing": str,
    "shift": float, "steps_offset": int,
}  # fmt: skip
CALL_KINDS: dict[str, Kinds] = {
    "guidance_scale": float, "true_cfg_scale": float, "height": int, "width": int, "max_sequence_length": int,
    "use_resolution_binning": bool,
}  # fmt: skip
MAX_TRAIN_TIMESTEPS = 100_000
# The lowest and the highest value of each number. No teacher draws pictures of 8,192 pixels a side.
RANGES: dict[str, tuple[float, float]] = {
    "format_version": (1, math.inf), "num_inference_steps": (1, 1000), "eta": (0, 1),
    "num_train_timesteps": (1, MAX_TRAIN_TIMESTEPS),
    "beta_start": (0, 1), "beta_end": (0, 1), "shift": (1e-3, 1e3), "steps_offset": (0, 1000),
    "guidance_scale": (0, 1000), "true_cfg_scale": (0, 1000), "height": (8, 8192), "width": (8, 8192),
    "max_sequence_length": (1, 8192),
}  # fmt: skip


def is_student(folder: str | Path) -> bool:
    """Whether a local folder holds a student."""
    return (Path(folder) / STUDENT_CONFIG).exists()


def package_version() -> str | None:
    """This package's release; None if it is not installed."""
    try:
        return version("rdm-diffusers")
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class StudentConfig:
    """How a student is loaded and sampled.

    Args:
        base_model_name_or_path: the teacher under a LoRA student; None for a full one, which stands alone.
        pipeline_class: the stock pipeline's class name.
        scheduler: the configuration of `RdmScheduler`, the trained grid and eta included.
        num_inference_steps: the trained number of steps.
        call_arguments: of the stock pipeline: the guidance value that means "off", and the picture size and the number
            of tokens if they differ from the pipeline's defaults.
        revision, variant: of the base model.
        vae: a folder or Hub id, if the autoencoder is not the base model's.
        license: the base model's licence tags, as in a model card: `license`, `license_name`, `license_link`.
        training: how it was trained, for readers: the `command`, the number of `updates`, whether its weights are
            `averaged`, and all `arguments`; empty if unknown.
        weights_sha256, scheduler_sha256: digests of a LoRA student's weights and of its stock scheduler's
            configuration, which reveal damage; None if unknown.
        base_file: of a base model that is a single file: `config`, the folder or Hub id with its configuration, whose
            `revision` and `variant` are meant, the file's `sha256`, and its `parts`, the components that are in it;
            None for other base models.
        base_loras: `name`, `scale` and `sha256` of the LoRAs that a LoRA student's base model must have.
        version: the release of this package that made it.
        format_version: of this file.
    """

    base_model_name_or_path: str | None
    pipeline_class: str
    scheduler: dict
    num_inference_steps: int
    call_arguments: dict = field(default_factory=dict)
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None
    scheduler_sha256: str | None = None
    base_loras: list[dict[str, Any]] = field(default_factory=list)
    base_file: dict[str, Any] | None = None
    version: str | None = field(default_factory=package_version)
    format_version: int = FIRST_VERSION

    def __post_init__(self) -> None:
        is_new = self.base_loras or isinstance(self.arguments.get("resolution"), str)  # as 1216x832
        object.__setattr__(self, "format_version", FORMAT_VERSION if is_new else FIRST_VERSION)

    @property
    def loras(self) -> list[Lora]:
        """The LoRAs that its base model must have."""
        return [Lora(each["name"], each["scale"]) for each in self.base_loras]

    @property
    def file(self) -> SingleFile | None:
        """Its base model's single file; None if that is a folder or a repository."""
        return SingleFile(str(self.base_model_name_or_path), self.base_file["config"]) if self.base_file else None

    @property
    def base_configuration(self) -> str:
        """The folder or Hub id with the configuration of a LoRA student's base model."""
        return self.file.config if self.file else str(self.base_model_name_or_path)

    @property
    def is_lora(self) -> bool:
        """Whether it needs its teacher's weights."""
        return self.base_model_name_or_path is not None

    @property
    def arguments(self) -> dict[str, Any]:
        """The training's arguments; empty if unknown."""
        return self.training.get("arguments", {})

    @property
    def sizes(self) -> list[str]:
        """The sizes that it was trained at, as `1216 x 832`, width first; empty if not known, or the teacher's."""
        buckets, resolution = (self.arguments.get(name) for name in ("aspect_ratio_buckets", "resolution"))
        sizes = read_buckets(buckets) if buckets else [] if resolution is None else [resolution]
        return [in_words(size) for size in sizes]

    @property
    def teacher(self) -> str | None:
        """The teacher's name; for a full student of a local folder only that folder's name."""
        return self.base_model_name_or_path or self.arguments.get("pretrained_model_name_or_path")

    def save(self, folder: Path) -> None:
        """Writes `rdm_config.json` into the folder, with a digest of its contents."""
        entries = json.loads(json.dumps(asdict(self)))
        (folder / STUDENT_CONFIG).write_text(json.dumps({**entries, DIGEST: digest_of(entries)}, indent=2) + "\n")

    @classmethod
    def load(cls, name_or_path: str, **hub_options) -> StudentConfig:
        """Reads a student's configuration from a folder or a Hub repository.

        Raises:
            ValueError: if there is none, if an entry is wrong, or if a newer release made it.
        """
        path = Path(name_or_path) / STUDENT_CONFIG
        if not Path(name_or_path).is_dir():
            path = fetch("student", name_or_path, STUDENT_CONFIG, **hub_options)
        elif not path.exists():
            check_no_checkpoint(name_or_path)
            if any(path.parent.glob(f"{ASIDE}*")):
                raise ValueError(
                    f"An export into {name_or_path} was interrupted; finish it with `rdm-card {name_or_path}`."
                )
            raise ValueError(
                f"{name_or_path} has no {STUDENT_CONFIG}, so it is not a student of ours; load it with stock diffusers."
            )
        entries = read_object(path, REMEDY, finite=False)
        digest = entries.pop(DIGEST, None)  # version 0.1.0 wrote none
        _check_release(name_or_path, entries)
        try:
            _check_entries(entries)
            if digest not in (None, digest_of(entries)):
                warn_of_change(path, DIGEST)
            names = {each.name for each in fields(cls)}  # a newer release may add entries
            return cls(**{name: value for name, value in entries.items() if name in names})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({described(error)}); {REMEDY}.") from error


def warn_of_change(path: Path, entry: str) -> None:
    """Warns that a student's file changed after its export, as an entry of `rdm_config.json` shows."""
    warnings.warn(
        f"{path} was changed since it was exported, as {entry} in rdm_config.json says; if nobody did that on purpose, "
        f"{REMEDY}.",
        stacklevel=4,
    )


def _check_release(name: str, entries: Mapping[str, Any]) -> None:
    """Refuses a newer release's file before the other entries are checked, because their kinds may have changed."""
    format_version = entries.get("format_version")
    if type(format_version) is int and format_version > FORMAT_VERSION:
        raise ValueError(
            f"{name} was made by rdm-diffusers {entries.get('version')}, which is newer than this "
            f"{package_version()}; upgrade with `pip install --upgrade rdm-diffusers`."
        )


def _check_entries(entries: Mapping[str, Any]) -> None:
    """Raises ValueError for the first wrong entry; the dataclass itself refuses missing ones."""
    check_entries(entries, STUDENT_KINDS, RANGES)
    check_scheduler(entries.get("scheduler", {}), "scheduler's ")
    call = entries.get("call_arguments", {})
    unknown = [name for name in call if name not in CALL_KINDS]
    if unknown:
        raise ValueError(f"call_arguments has {unknown[0][:40]!r}, with which no student is called")
    check_entries(call, CALL_KINDS, RANGES, "call_arguments' ")
    license_tags, training = entries.get("license", {}), entries.get("training", {})
    check_kinds(license_tags, dict.fromkeys(license_tags, str), "license's ")
    check_kinds(training, TRAINING_KINDS, "training's ")
    arguments = training.get("arguments", {})
    check_kinds(arguments, ARGUMENT_KINDS, "training's argument ")
    _check_loras(entries.get("base_loras", []))
    for name, bound in (("resolution", RESOLUTION), ("aspect_ratio_buckets", BUCKETS)):
        if arguments.get(name) is not None and bound.problem(arguments[name]):
            raise ValueError(f"training's argument {name} should hold sizes")
    if (file := entries.get("base_file")) is not None:
        check_kinds(file, FILE_KINDS, "base_file's ")
        if file.keys() != FILE_KINDS.keys() or not all(isinstance(part, str) for part in file["parts"]):
            raise ValueError("base_file should hold config, sha256 and parts")
    for name in ("reward", "teacher_lora"):
        if not all(isinstance(each, str) for each in arguments.get(name) or []):
            raise ValueError(f"training's argument {name} should hold text")


def _check_loras(loras: list[Any]) -> None:
    whole = all(isinstance(each, dict) and each.keys() == LORA_KINDS.keys() for each in loras)
    if len(loras) > MOST_LORAS or not whole:
        raise ValueError("base_loras should hold a few LoRAs, each with name, scale and sha256")
    for each in loras:
        check_entries(each, LORA_KINDS, {"scale": (-1000, 1000)}, "base_loras' ")


def check_scheduler(config: Mapping[str, Any], inside: str = "") -> None:
    """Raises ValueError for the first number that no scheduler has, or that would fill the memory.

    Args:
        config: of our scheduler or a stock one; entries that ours does not have are not checked.
        inside: its name in the error.
    """
    check_entries(config, SCHEDULER_KINDS, RANGES, inside)
    last = config.get("num_train_timesteps", 1000)
    for name, highest in (("trained_betas", 1), ("student_timesteps", last), ("student_sigmas", 1)):
        values = config.get(name) or []
        if len(values) > MAX_TRAIN_TIMESTEPS:
            raise ValueError(f"{inside}{name} has {len(values)} numbers")
        if not all(is_kind(value, float) and 0 <= value <= highest for value in values):
            raise ValueError(f"{inside}{name} should hold numbers from 0 to {highest}")


def check_entries(
    entries: Mapping[str, Any], kinds: Mapping[str, Kinds], ranges: Mapping[str, tuple[float, float]], inside: str = ""
) -> None:
    """Raises ValueError for the first entry of another kind, or outside its range; `inside` is its owner's name."""
    check_kinds(entries, kinds, inside)
    for name, (low, high) in ranges.items():
        if name in entries and not low <= entries[name] <= high:
            raise ValueError(f"{inside}{name} is {entries[name]}, and should be from {low:g} to {high:g}")
