"""`rdm_config.json`: what a student's folder says beside its stock diffusers files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..families import STUDENT_CONFIG, check_no_checkpoint, fetch
from ..folders import ASIDE
from ..json_files import described, digest_of, read_object
from .student_checks import REMEDY, check_student_entries, warn_of_change

DIGEST = "digest"
FORMAT_VERSION = 1  # raised when older releases would sample a student wrongly, not when something is added


def is_student(folder: str | Path) -> bool:
    """Whether a local folder holds a student."""
    return (Path(folder) / STUDENT_CONFIG).exists()


def package_version() -> str | None:
    """This package's release; None where it is not installed."""
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
        call_arguments: what else the stock pipeline is called with: the value that means that guidance is off, and what
            differs from its own defaults of the pictures' size and of the tokens that are read.
        revision, variant: of the base model.
        vae: another autoencoder than the base model's, a folder or a Hub id.
        license: the base model's licence tags, as in a model card: `license`, `license_name`, `license_link`.
        training: how it was trained, for readers: the `command`, the number of `updates`, whether its weights are
            `averaged`, and all `arguments`, the teacher and the method among them; empty if unknown.
        weights_sha256, scheduler_sha256: digests of what a LoRA student's weights and its stock scheduler's
            configuration hold, by which damage is noticed; None where they are not known.
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
    version: str | None = field(default_factory=package_version)
    format_version: int = FORMAT_VERSION

    @property
    def is_lora(self) -> bool:
        """Whether it needs its teacher's weights."""
        return self.base_model_name_or_path is not None

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the training; empty if unknown."""
        return self.training.get("arguments", {})

    @property
    def teacher(self) -> str | None:
        """What it was distilled from; of a full student of a local folder only that folder's name."""
        return self.base_model_name_or_path or self.arguments.get("pretrained_model_name_or_path")

    def save(self, folder: Path) -> None:
        """Writes `rdm_config.json` into the folder, with a digest of what it says."""
        entries = json.loads(json.dumps(asdict(self)))
        (folder / STUDENT_CONFIG).write_text(json.dumps({**entries, DIGEST: digest_of(entries)}, indent=2) + "\n")

    @classmethod
    def load(cls, name_or_path: str, **hub_options) -> StudentConfig:
        """Reads a student's configuration from a folder or a Hub repository.

        Raises:
            ValueError: if there is none, if it does not hold what it should, or if a newer release made it.
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
            check_student_entries(entries)
            if digest not in (None, digest_of(entries)):
                warn_of_change(path, DIGEST)
            known = {each.name for each in fields(cls)}  # a newer release may tell more
            return cls(**{name: value for name, value in entries.items() if name in known})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({described(error)}); {REMEDY}.") from error


def _check_release(name: str, entries: Mapping[str, Any]) -> None:
    """Refuses what a newer release made, before anything else of it is looked at, as that may have changed."""
    made = entries.get("format_version")
    if type(made) is int and made > FORMAT_VERSION:
        raise ValueError(
            f"{name} was made by rdm-diffusers {entries.get('version')}, which is newer than this "
            f"{package_version()}; upgrade with `pip install --upgrade rdm-diffusers`."
        )
