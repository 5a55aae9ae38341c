"""What a sampler's pictures are worth: distances to the teacher's and to the data's, and faithfulness to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from ..frechet import GaussianStatistics, frechet_distance
from ..tiny import TINY_NAME
from ..tiny.captions import CAPTIONS, parse_caption
from ..tiny.classifier import load_classifier
from ..tiny.reference import load_statistics
from .samplers import Sampler


@dataclass(frozen=True)
class Metrics:
    """One sampler's numbers.

    Args:
        nfe: network calls for one picture, guidance included.
        fd_to_teacher: Fréchet distance to the teacher's 50-step pictures in the tiny feature net; None if unmeasured.
        fd_to_data: the same to the training pictures.
        prompt_accuracy: the share of pictures whose digit, ink and background are all as asked.
        seconds_per_image: wall-clock time, decoding included.
        sampler: the solver's name.
        num_images: how many pictures were measured.
    """

    nfe: int
    fd_to_teacher: float | None
    fd_to_data: float | None
    prompt_accuracy: float | None
    seconds_per_image: float
    sampler: str
    num_images: int

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def evaluation_prompts(count: int) -> list[str]:
    """`count` captions, every drawing equally often."""
    return [CAPTIONS[i % len(CAPTIONS)] for i in range(count)]


def measure(
    sampler: Sampler, name: str, num_images: int, first_seed: int = 1_000_000, teacher: str = TINY_NAME
) -> Metrics:
    """Draws `num_images` pictures of all captions with a tiny teacher's or its student's sampler and measures them.

    Args:
        sampler: draws them.
        name: the sampler's, for the record.
        num_images: how many.
        first_seed: of the first; the others have the following ones.
        teacher: the name of the embedded teacher whose pictures are the reference.
    """
    prompts = evaluation_prompts(num_images)
    images, seconds = sampler(prompts, range(first_seed, first_seed + num_images))
    return measure_images(images, prompts, sampler.nfe, seconds, name, teacher)


def measure_images(
    images: Tensor, prompts: Sequence[str], nfe: int, seconds: float, name: str, teacher: str = TINY_NAME
) -> Metrics:
    """Measures pictures `[N, 3, 32, 32]` in [0, 1] that are there already, as `measure` does."""
    classifier, reference = load_classifier(), load_statistics(teacher)
    statistics = GaussianStatistics.of(classifier.features(images))
    correct = classifier.correct(images, [parse_caption(prompt) for prompt in prompts])
    return Metrics(
        nfe=nfe,
        fd_to_teacher=frechet_distance(statistics, reference["teacher"]),
        fd_to_data=frechet_distance(statistics, reference["data"]),
        prompt_accuracy=correct["all"].float().mean().item(),
        seconds_per_image=seconds,
        sampler=name,
        num_images=len(images),
    )
