"""The end of a run: the exported student draws beside its teacher, and is measured."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import free_memory

from ..config import RunConfig
from ..config.record import shown_arguments
from ..evaluation import as_table, put, save_samples, tiny_metrics, write_metrics
from ..families import load_denoiser
from ..hub import write_card
from ..pipelines import RdmDistillationPipeline
from ..program import explain, one_line
from ..report import Report
from ..tiny import is_tiny
from .assembly import DTYPES, load

PICTURES_AT_ONCE = 8  # in samples.png, and never more than a batch


def draw_and_measure(
    output_dir: Path, shown: list[str], config: RunConfig, device: torch.device, report: Report | None = None
) -> None:
    """Writes `samples.png`, `metrics.json` and the model card, and prints the numbers.

    The student is on the disk already. An error here becomes a warning, and the run goes on.

    Args:
        output_dir: the student's folder.
        shown: the prompts of the pictures.
        config: the run's.
        device: where to draw; with `--offload`, networks wait in the machine's memory while they are idle.
        report: the training's, which gets the numbers; None if nothing was trained.
    """
    with extra(f"the student's pictures and numbers could not be made; {output_dir} holds it without them"):
        draw_samples(output_dir, shown, config, device)
    free_memory()
    if report is not None:
        with extra("report.html could not be written"):
            report.finish()
    with extra(f"the card could not be written; try again with rdm-card {output_dir}"):
        print(f"\nThe student's card is {write_card(output_dir)}. Load the student with:")
        print(f"RdmDistillationPipeline.from_pretrained({str(output_dir)!r})")


@contextmanager
def extra(what: str) -> Iterator[None]:
    """Turns any error inside into a warning; an unforeseen one also shows its traceback."""
    try:
        yield
    except Exception as error:
        if explain(error) is None:
            traceback.print_exc()
        warnings.warn(f"The student is safe, but {what} ({one_line(error)}).", stacklevel=3)


def draw_samples(output_dir: Path, shown: list[str], config: RunConfig, device: torch.device) -> None:
    """Draws with the student, loaded as any user would load it, and with its teacher, and measures both."""
    free_memory()  # of the training's networks
    teacher, source, dtype = load(config, device), config.teacher, DTYPES[config.memory.mixed_precision]
    stock, name = teacher.pipeline, teacher.family.denoiser_name
    # The student shares all networks but its own with its teacher.
    parts = {key: part for key, part in stock.components.items() if isinstance(part, torch.nn.Module) and key != name}
    if teacher.loras and config.student_base == "teacher":
        parts = {"vae": stock.vae}  # the student's pipeline adds the LoRAs to its text encoders itself
    if config.student.quantization and config.is_lora:
        origin = (source.pretrained_model_name_or_path, dtype, source.revision, source.variant)
        parts[name] = load_denoiser(*origin, config.student.quantization, device, source.single_file_config)
    student = RdmDistillationPipeline.from_pretrained(output_dir, dtype=dtype, **parts)
    for pipeline in (stock, student):
        put(pipeline, device, config.memory.offload)
    at_once, scale = min(config.optimisation.train_batch_size, PICTURES_AT_ONCE), config.method.sample_guidance_scale
    arguments = shown_arguments(config.as_arguments())
    metrics = save_samples(output_dir / "samples.png", stock, student, scale, shown, at_once)
    write_metrics(output_dir / "metrics.json", metrics, arguments, shown)
    if is_tiny(teacher.name) and not teacher.loras and config.output.num_eval_images:
        metrics = tiny_metrics(stock, student, scale, config.output.num_eval_images, teacher.name)
        write_metrics(output_dir / "metrics.json", metrics, arguments, shown)
    print(f"\n{as_table(metrics)}")
