"""What a user sees of an error, and the status that a program ends with."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from tokenizers import Tokenizer

from rdm_diffusers.commands import card, export, push
from rdm_diffusers.evaluation import command
from rdm_diffusers.program import explain, run_program
from rdm_diffusers.training.finite import NonFiniteError
from rdm_diffusers.training.monitor import CollapseError


def caught(work: Callable[[], object]) -> BaseException:
    """What some real work raises."""
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError


def damaged_weights(folder: Path) -> BaseException:
    (folder / "weights.safetensors").write_bytes(b"nonsense of some length")
    return caught(lambda: safe_open(folder / "weights.safetensors", "pt"))


def damaged_json(folder: Path) -> BaseException:
    return caught(lambda: json.loads('{"a": '))


def damaged_tokenizer(folder: Path) -> BaseException:
    return caught(lambda: Tokenizer.from_str('{"version": 3}'))


def other_encoding(folder: Path) -> BaseException:
    (folder / "text.txt").write_bytes("Gemälde".encode("latin-1"))
    return caught(lambda: (folder / "text.txt").read_text("utf-8"))


def missing_file(folder: Path) -> BaseException:
    return caught(lambda: (folder / "nowhere").read_text())


def too_much_memory(folder: Path) -> BaseException:
    return caught(lambda: torch.empty(2**60))


def no_gpu_memory(folder: Path) -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")


def no_machine_memory(folder: Path) -> BaseException:
    return MemoryError()


def bad_data_set(folder: Path) -> BaseException:
    error = DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = ValueError("row 3 is cut off")
    return error


def no_hub(folder: Path) -> BaseException:
    return LocalEntryNotFoundError("Cannot find the file in the cache.")


def no_connection(folder: Path) -> BaseException:
    library = sys.modules[HfHubHTTPError.__mro__[1].__module__.split(".")[0]]  # it was httpx, and is httpx2
    return library.ConnectError("[Errno 111] Connection refused")


def lost_process(folder: Path) -> BaseException:
    return RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")


FORESEEN = {
    damaged_weights: r"A file of weights is cut off, damaged or no safetensors \(.*\); download or write it again\.",
    damaged_json: r"A file that should hold JSON is damaged \(.*line 1.*\); download",
    damaged_tokenizer: r"A file of a model is damaged, or of an unknown kind \(.*\); download it again\.",
    other_encoding: r"A file that should hold text is not in UTF-8 \(.*position 3.*\); convert it\.",
    missing_file: r"No such file or directory: .*nowhere",
    too_much_memory: r"There is not enough memory \(.*\); lower this\.",
    no_gpu_memory: r"There is not enough memory \(CUDA out of memory\. Tried to allocate 2\.00 GiB\. See .*\); lower",
    no_machine_memory: r"There is not enough memory \(MemoryError\); lower this\.",
    bad_data_set: r"A data file cannot be read \(row 3 is cut off\); check it",
    no_hub: r"Cannot find the file in the cache\.",
    no_connection: r"The connection to the Hub failed \(.*refused.*\); check the network and try again\.",
    lost_process: r"Another process of this run has ended, and says why in a message of its own",
}


@pytest.mark.parametrize("make", FORESEEN, ids=lambda make: make.__name__)
def test_an_error_that_can_be_foreseen_is_one_line_that_says_what_to_do(make, tmp_path: Path) -> None:
    sentence = explain(make(tmp_path), "lower this")
    assert sentence is not None and "\n" not in sentence
    assert re.search(FORESEEN[make], sentence), sentence


@pytest.mark.parametrize("kind", [ValueError, ImportError, OSError, NonFiniteError, CollapseError])
def test_an_error_that_says_itself_what_to_do_is_shown_as_it_is(kind: type[Exception]) -> None:
    assert explain(kind("Do this.")) == "Do this."


@pytest.mark.parametrize(
    "error", [KeyError("a"), TypeError("b"), AttributeError("c"), RuntimeError("d"), AssertionError()]
)
def test_a_bug_is_not_explained_away(error: Exception) -> None:
    assert explain(error) is None


def outcome(main: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """The status of a program, or minus the signal that killed it, and what it wrote to stderr."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status: object = 99
        try:
            prepare()
            run_program(main, "lower this")
            status = 0
        except SystemExit as error:
            status = error.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        finally:
            sys.stderr.flush()
            os._exit(status if isinstance(status, int) else 98)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def fail(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def test_foreseen_errors_end_a_program_with_a_sentence_and_the_status_1() -> None:
    assert outcome(fail(ValueError("Do\nthis."))) == (1, "error: Do this.\n")


def test_a_bug_shows_its_traceback_and_so_does_any_error_on_demand() -> None:
    status, said = outcome(fail(KeyError("colour")))
    assert status == 1 and "Traceback" in said and "KeyError: 'colour'" in said
    status, said = outcome(fail(ValueError("Do this.")), lambda: os.environ.update(RDM_TRACEBACK="1"))
    assert status == 1 and "Traceback" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_a_program_with_its_status_after_it_has_tidied_up(number: int, tmp_path: Path) -> None:
    def main() -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            (tmp_path / "tidied").touch()

    status, said = outcome(main)
    assert status == 128 + number and "Traceback" not in said
    assert (tmp_path / "tidied").exists()


def test_with_nohup_a_hang_up_ends_nothing() -> None:
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    assert outcome(lambda: os.kill(os.getpid(), signal.SIGHUP), ignore) == (0, "")


def test_a_program_outlives_who_reads_its_output() -> None:
    def closed_pipe() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = os.fdopen(writer, "w")
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python does when it starts

    def main() -> None:
        for _ in range(3):
            print("x" * 100_000, flush=True)
        print("the last line stays in the buffer")

    assert outcome(main, closed_pipe) == (0, "")


@pytest.mark.parametrize("program", [card, export, push, command], ids=lambda program: program.__name__)
def test_every_command_ends_by_the_same_rules(program, tmp_path: Path, monkeypatch, capsys) -> None:
    words = {
        card: [str(tmp_path)],
        export: [str(tmp_path), "--format", "lora", "--output_dir", str(tmp_path / "new")],
        push: [str(tmp_path), "me/student"],
        command: ["compare", str(tmp_path / "a"), str(tmp_path / "b")],
    }
    monkeypatch.setattr(sys, "argv", ["program", *words[program]])
    before = sys.stdout, sys.stderr, signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match=r"^error: .*\.$"):
        program.run()
    monkeypatch.setattr(program, "main", fail(KeyError("colour")))
    with pytest.raises(KeyError, match="colour"):
        program.run()
    assert before == (sys.stdout, sys.stderr, signal.getsignal(signal.SIGTERM))
