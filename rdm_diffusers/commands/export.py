"""`rdm-export`: any checkpoint or student in any format.

A checkpoint becomes a student's folder first, and every format is made from such a folder. The files are written aside
and moved into place at the end, so that an export that fails leaves nothing behind.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from ..bounds import PATH, REVISION, TOKEN, Bound, Parser, Text
from ..config import RunConfig
from ..evaluation.subjects import DTYPES
from ..families import explain_hub_errors, family_of, pipeline_config, use_token
from ..folders import aside, sync_tree
from ..hub import WritingError, finish_exports, write_card
from ..hub.comfyui import check_comfyui, comfyui_name, read_lora, write_comfyui
from ..hub.export import copy_lora, write_full, writing
from ..hub.student_files import check_complete, copy_files, student_files
from ..pipelines import StudentConfig, is_student
from ..program import run_program
from ..training.checkpoint_files import PREFIX, RECORD, list_checkpoints
from ..training.exporting import chosen_weights, export_checkpoint, read_run

FORMATS = ("lora", "full", "comfyui")
MEASURED = ("samples.png", "pictures/*.png", "metrics.json", "evaluation.json")  # what a student's card shows
READ = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "samples.png", "pictures/*.png"]  # never pickles
NOT_READ = [f"{PREFIX}*", "comfyui/*", "logs/*", "validation/*"]
BOUNDS: dict[str, Bound] = {
    "source": Text("a folder or a Hub id"), "output_dir": PATH, "revision": REVISION, "token": TOKEN,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What is exported."""

    folder: Path  # a checkpoint's, or a student's
    pipeline_class: str  # the stock pipeline's name
    is_lora: bool
    run: RunConfig | None = None  # the run's configuration, for a checkpoint


# fmt: off
def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        "rdm-export", description="Exports a checkpoint or a student in any format.",
        epilog="Downloads from the Hub are cached where HF_HUB_CACHE or HF_HOME say.",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a checkpoint-N folder of a run, a student's folder, or its Hub id")
    add("--format", required=True, choices=FORMATS,
        help="lora: for diffusers; full: a whole stock pipeline; comfyui: one LoRA file for ComfyUI and kohya's tools")
    add("--output_dir", required=True, help="a new or empty folder")
    add("--dtype", default="float32", choices=tuple(DTYPES),
        help="of the written weights, in full of all networks'; float32, as they are trained, by default")
    add("--use_ema", action=argparse.BooleanOptionalAction,
        help="a checkpoint's moving average, or its weights as trained; by default the average where there is one")
    add("--revision", help="a student's Hub revision")
    add("--token", help="for private repositories on the Hub; that of `hf auth login` or HF_TOKEN by default")
    return parser
# fmt: on


def main(argv: Sequence[str] | None = None) -> Path:
    """Exports; the folder that was written.

    Raises:
        ValueError, ImportError, OSError: one sentence on what is wrong and what to do.
    """
    args = make_parser().parse_within(BOUNDS, argv)
    use_token(args.token)
    target = Path(args.output_dir).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--output_dir {args.output_dir} is not empty; choose another.")
    source, dtype = find_source(args.source, args.format, args.use_ema, args.revision), DTYPES[args.dtype]
    with in_place_of(target) as (folder, bench):
        student = source.folder
        if source.run is not None:
            student = bench
            export_checkpoint(source.folder, source.run, student, args.use_ema)
        if args.format == "full":
            write_full(student, folder, dtype)
        elif args.format == "lora":
            copy_lora(student, folder, dtype)
        else:
            with writing(folder):
                write_comfyui(student, folder / comfyui_name(folder), source.pipeline_class, dtype)
        if args.format != "comfyui":
            if source.run is None and args.dtype == "float32":  # rounded weights were not measured
                copy_files(source.folder, folder, MEASURED)
            write_card(folder, args.output_dir)
    print(f"Wrote {args.output_dir}.")
    return target


def find_source(name: str, kind: str, use_ema: bool | None, revision: str | None) -> Source:
    """Finds SOURCE and refuses, before anything large is read, what cannot be exported in this format.

    Raises:
        ValueError: one sentence on what is wrong and what to do.
    """
    folder = Path(name)
    source = _checkpoint(folder, use_ema) if (folder / RECORD).exists() else _student(name, use_ema, revision)
    if kind != "full" and not source.is_lora:
        raise ValueError(f"{name} holds a full student, which cannot become a LoRA; export it with --format full.")
    if kind == "comfyui":
        check_comfyui(source.pipeline_class)
    return source


def _checkpoint(folder: Path, use_ema: bool | None) -> Source:
    run = read_run(folder)
    chosen_weights(folder, use_ema)
    index = pipeline_config(run.teacher.configuration, revision=run.teacher.revision)
    return Source(folder, index["_class_name"], run.is_lora, run)


def _student(name: str, use_ema: bool | None, revision: str | None) -> Source:
    folder = Path(name)
    if folder.is_dir():
        finish_exports(folder)
        if not is_student(folder):
            inside = list_checkpoints(folder)
            what = f"{inside[-1]} is a checkpoint, give that" if inside else "give a checkpoint-N folder or a student's"
            raise ValueError(f"{name} holds neither a checkpoint ({RECORD}) nor a finished student; {what}.")
    elif folder.parent.is_dir() and folder.parent != Path():
        others = [checkpoint.name for checkpoint in list_checkpoints(folder.parent)]
        what = f"its checkpoints are {', '.join(others)}" if others else "check the name, or call from another folder"
        raise ValueError(f"{folder.parent} holds no folder {folder.name}; {what}.")
    if use_ema is not None:
        raise ValueError(f"{name} is a finished student with one set of weights; leave --use_ema and --no-use_ema out.")
    student = StudentConfig.load(name, revision=revision)
    family_of({"_class_name": student.pipeline_class})
    if not folder.is_dir():
        with explain_hub_errors("student", name, revision):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=READ, ignore_patterns=NOT_READ))
    student_files(folder)  # first, because it refuses links out of the folder
    if student.is_lora:
        read_lora(folder)
    check_complete(folder)
    return Source(folder, student.pipeline_class, student.is_lora)


@contextmanager
def in_place_of(target: Path) -> Iterator[tuple[Path, Path]]:
    """Two empty folders beside `target`: one of its name, which takes its place at the end, and one to work in.

    Raises:
        OSError: if they cannot be written; nothing is left behind then.
    """
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            hidden = stack.enter_context(aside(target.parent))
            folder, bench = hidden / "export" / target.name, hidden / "student"
            folder.mkdir(parents=True)
            bench.mkdir()
        except OSError as error:
            raise OSError(f"--output_dir {target} cannot be written ({error.strerror}); choose another.") from error
        try:
            yield folder, bench
            sync_tree(folder)
            folder.replace(target)
        except WritingError as error:
            cause = error.__cause__
            raise OSError(
                f"{target} could not be written ({cause}), and nothing is left of it; free some space and export again."
            ) from error


def run() -> None:
    """The console script: `main`, with its errors as one line."""
    run_program(main)
