"""`rdm-demo`: a page in the browser that shows a student beside its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event

import torch

from ..bounds import REVISION, TOKEN, Bound, Parser, Text, set_bounds, whole
from ..demo import example_prompts, import_gradio, load_comparison, make_page, serving
from ..evaluation.subjects import DTYPES
from ..families import use_token
from ..program import run_program
from ..tiny import is_tiny

MEMORY_ADVICE = "try --dtype bfloat16, or --no_teacher"
BOUNDS: dict[str, Bound] = {
    "source": Text("a folder or a Hub id"),
    "server_name": Text("an address of this machine, for example 0.0.0.0", lambda text: " " not in text.strip()),
    "server_port": whole("[1, 65535]"),
    "device": Text("cpu, or an accelerator of this machine such as cuda or cuda:1", lambda text: is_device(text)),
    "revision": REVISION,
    "token": TOKEN,
}


# fmt: off
def make_parser() -> Parser:
    """The command line."""
    parser = Parser("rdm-demo", description="Shows a student beside its teacher, in a page for the browser.")
    add = parser.add_argument
    add("source", metavar="STUDENT", help="a student's folder or its Hub id")
    add("--no_teacher", action="store_true", help="show the student alone, and load no second network")
    add("--device", help="where it draws, for example cpu or cuda:1; by default an accelerator, if there is one")
    add("--dtype", default="float32", choices=tuple(DTYPES), help="of all networks; float32 by default")
    add("--server_name", default="127.0.0.1",
        help="the address that the page is served at; 127.0.0.1, for this machine alone, by default")
    add("--server_port", help="the page's port; by default the first free one from 7860 on")
    add("--share", action="store_true", help="also hand the page on to the internet, by Gradio's servers")
    add("--revision", help="the student's Hub revision")
    add("--token", help="for private repositories on the Hub; that of `hf auth login` or HF_TOKEN by default")
    set_bounds(parser, BOUNDS)
    return parser
# fmt: on


def is_device(name: str) -> bool:
    """Whether this machine has a device of this name."""
    with suppress(RuntimeError):
        device = torch.device(name)
        if device.type == "cpu":
            return True
        return device.type == best_device().type and (device.index or 0) < torch.accelerator.device_count()
    return False


def best_device() -> torch.device:
    """This machine's accelerator, or its CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def shown_name(name: str) -> str:
    """A folder's own name, or a Hub id."""
    return Path(name).resolve().name if not is_tiny(name) and Path(name).is_dir() else name


def main(argv: Sequence[str] | None = None) -> None:
    """Loads a student and its teacher, and serves the page until Ctrl-C.

    Raises:
        ValueError, ImportError, OSError: one sentence on what is wrong and what to do.
    """
    args = make_parser().parse_within(BOUNDS, argv)
    import_gradio()
    use_token(args.token)
    device = torch.device(args.device) if args.device else best_device()
    student = shown_name(args.source)
    print(f"Loading {student}{'' if args.no_teacher else ' and its teacher'} on {device}.", flush=True)
    comparison = load_comparison(args.source, DTYPES[args.dtype], device, not args.no_teacher, args.revision)
    prompts = example_prompts(args.source, comparison.student, args.revision)
    comparison.warm_up()
    page = make_page(comparison, student, shown_name(comparison.student.teacher or ""), prompts)
    with serving(page, args.server_name, args.server_port, args.share) as addresses, suppress(KeyboardInterrupt):
        print(f"The page is at {' and '.join(addresses)}; Ctrl-C ends it.", flush=True)
        Event().wait()


def run() -> None:
    """The console script: `main`, with its errors as one line."""
    run_program(main, MEMORY_ADVICE)


if __name__ == "__main__":
    run()
