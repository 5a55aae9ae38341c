"""`rdm_config.json`: what a student's folder says beside its stock diffusers files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from ..families import STUDENT_CONFIG


def is_student(folder: str | Path) -> bool:
    """Whether a local folder holds a student."""
    return (Path(folder) / STUDENT_CONFIG).exists()


@dataclass(frozen=True)
class StudentConfig:
    """How a student is loaded and sampled.

    Args:
        base_model_name_or_path: the teacher under a LoRA student; None for a full one, which stands alone.
        pipeline_class: the stock pipeline's class name.
        scheduler: the configuration of `RdmScheduler`, the trained grid included.
        num_inference_steps: the trained number of steps.
        call_arguments: what else the stock pipeline is called with: the value that means that guidance is off, and what
            differs from its own defaults of the pictures' size and of the tokens that are read.
        revision, variant: of the base model.
        vae: another autoencoder than the base model's, a folder or a Hub id.
    """

    base_model_name_or_path: str | None
    pipeline_class: str
    scheduler: dict
    num_inference_steps: int
    call_arguments: dict = field(default_factory=dict)
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None

    def save(self, folder: Path) -> None:
        """Writes `rdm_config.json` into the folder."""
        (folder / STUDENT_CONFIG).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, name_or_path: str, **hub_options) -> StudentConfig:
        """Reads a student's configuration from a folder or a Hub repository.

        Raises:
            ValueError: if there is none, or it does not hold what it should.
        """
        path = Path(name_or_path) / STUDENT_CONFIG
        if not Path(name_or_path).is_dir():
            try:
                path = Path(hf_hub_download(name_or_path, STUDENT_CONFIG, **hub_options))
            except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
                raise ValueError(
                    f"No {STUDENT_CONFIG} of a student could be found at {name_or_path!r}; check the path or Hub id, "
                    "and log in with `hf auth login` if it is private."
                ) from error
        elif not path.exists():
            raise ValueError(
                f"{name_or_path} has no {STUDENT_CONFIG}, so it is not a student of ours; load it with stock diffusers."
            )
        try:
            return cls(**json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); download or export the student again.") from error
