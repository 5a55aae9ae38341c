"""How the student is measured while it trains, and what follows from the measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..bounds import COUNT, PATH, OneOf, Text, real, whole
from ..tiny import is_tiny
from .fields import flag

if TYPE_CHECKING:
    from .run_config import RunConfig

DISTANCES = ("fd_to_teacher", "fd_to_data")
ACCURACY = "prompt_accuracy"
FEATURES = ("tiny", "inception", "inception-clean")
METRIC = Text(f"{', '.join(DISTANCES)}, {ACCURACY}, or a reward as --reward takes it")
PLACE = Text("a folder, a file, or a tiny teacher's name")


# fmt: off
@dataclass(frozen=True)
class ValidationConfig:
    """Metrics of the student's moving average every `--validation_steps`, the best checkpoint, and early stopping."""

    validation_metrics: tuple[str, ...] = flag(
        (), f"one or several of {', '.join(DISTANCES)}, {ACCURACY}, and rewards as --reward takes them, without "
        "weights: measured every --validation_steps updates", METRIC, free=True, is_path=True, is_list=True)
    num_validation_metric_images: int = flag(
        256, "images that they measure, always of the same prompts and noises", whole("[2, 1000000]"), free=True)
    validation_prompts_file: str | None = flag(
        None, "prompts of these images: a text file with one prompt a line, or a set of rdm-evaluate (hpdv2, coco, "
        "parti); by default the captions of a tiny teacher, or else the run's own prompts", PATH, free=True,
        is_path=True)
    reference_teacher: str | None = flag(
        None, "for fd_to_teacher, as rdm-evaluate takes it: a folder of images, statistics (.safetensors or .npz), or "
        "a tiny teacher's name; that of a tiny teacher by default", PLACE, free=True, is_path=True)
    reference_data: str | None = flag(
        None, "for fd_to_data, the same", PLACE, free=True, is_path=True)
    features: str | None = flag(
        None, "the network of the distances; by default inception, and a tiny teacher's own for it", OneOf(FEATURES),
        free=True)
    feature_weights: str | None = flag(
        None, "the file of the Inception weights, where there is no network", PATH, free=True, is_path=True)
    metric_for_best_model: str | None = flag(
        None, "one of --validation_metrics: the checkpoint that is best by it is kept as checkpoint-best", METRIC,
        free=True, is_path=True)
    greater_is_better: bool | None = flag(
        None, "whether more of that metric is better; by default not for distances, but for all others", free=True)
    load_best_model_at_end: bool = flag(False, "export the student of checkpoint-best", free=True)
    early_stopping_patience: int | None = flag(
        None, "end the training after so many validations in a row without a better value", COUNT, free=True)
    early_stopping_threshold: float = flag(
        0.0, "how much better a value must be to count for --early_stopping_patience", real("[0, inf)"), free=True)

    @property
    def distances(self) -> list[str]:
        """The Fréchet distances among the metrics."""
        return [name for name in self.validation_metrics if name in DISTANCES]

    @property
    def rewards(self) -> list[str]:
        """The rewards among the metrics, as `--reward` takes them."""
        return [name for name in self.validation_metrics if name not in (*DISTANCES, ACCURACY)]

    @property
    def more_is_better(self) -> bool:
        """Whether more of `metric_for_best_model` is better."""
        if self.greater_is_better is None:
            return self.metric_for_best_model not in DISTANCES
        return self.greater_is_better
# fmt: on

USUAL = ValidationConfig()
OF_DISTANCES = ("features", "feature_weights")
OF_METRICS = (
    "num_validation_metric_images", "validation_prompts_file", "reference_teacher", "reference_data", *OF_DISTANCES,
    "metric_for_best_model",
)  # fmt: skip
OF_BEST = ("greater_is_better", "load_best_model_at_end", "early_stopping_patience")


def shipped_reference(config: RunConfig) -> str | None:
    """The tiny teacher whose reference the package has, if the run's teacher is one, without LoRAs."""
    teacher = config.teacher
    name = teacher.pretrained_model_name_or_path
    return name if is_tiny(name) and not teacher.teacher_lora else None


def check_validation(config: RunConfig) -> None:
    """Refuses flags that would have no effect, and metrics that have no reference; ValueError of one sentence."""
    validation = config.validation
    given = {name for name in (*OF_METRICS, *OF_BEST) if getattr(validation, name) != getattr(USUAL, name)}
    given |= {"early_stopping_threshold"} if validation.early_stopping_threshold else set()
    if not validation.validation_metrics:
        _refuse(given, "--validation_metrics")
        return
    if len(set(validation.validation_metrics)) < len(validation.validation_metrics):
        raise ValueError("--validation_metrics names one metric twice; name each once.")
    _check_references(config, given)
    if validation.metric_for_best_model is None:
        _refuse(given & {*OF_BEST, "early_stopping_threshold"}, "--metric_for_best_model")
    elif validation.metric_for_best_model not in validation.validation_metrics:
        raise ValueError(
            f"--metric_for_best_model is {validation.metric_for_best_model}; it must be one of --validation_metrics "
            f"({', '.join(validation.validation_metrics)})."
        )
    if validation.early_stopping_patience is None:
        _refuse(given & {"early_stopping_threshold"}, "--early_stopping_patience")
    steps, last = config.output.validation_steps, config.optimisation.max_train_steps
    if steps > last and config.optimisation.num_train_epochs is None:
        raise ValueError(
            f"--validation_metrics would never be measured: --validation_steps is {steps}, and --max_train_steps "
            f"{last}; lower --validation_steps."
        )


def _check_references(config: RunConfig, given: set[str]) -> None:
    validation, shipped = config.validation, shipped_reference(config)
    for distance in DISTANCES:
        flag = f"reference_{distance.removeprefix('fd_to_')}"
        if distance not in validation.validation_metrics:
            _refuse(given & {flag}, f"{distance} to --validation_metrics")
        elif shipped is None and getattr(validation, flag) is None:
            raise ValueError(
                f"--validation_metrics {distance} needs a reference: add --{flag} with a folder of images or with "
                "statistics of rdm-evaluate."
            )
    if not validation.distances:
        _refuse(given & set(OF_DISTANCES), "fd_to_teacher or fd_to_data to --validation_metrics")
    if ACCURACY in validation.validation_metrics and not is_tiny(config.teacher.pretrained_model_name_or_path):
        raise ValueError(
            f"--validation_metrics {ACCURACY} is known for the embedded teachers alone; leave it out, or use a reward."
        )


def _refuse(given: set[str], missing: str) -> None:
    """ValueError for the first of the flags that have no effect without another."""
    if given:
        raise ValueError(f"--{min(given)} would have no effect; leave it out, or add {missing}.")
