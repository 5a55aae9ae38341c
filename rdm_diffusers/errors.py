"""What a user sees of an error: one sentence where it could be foreseen, and its traceback where it is a bug."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from safetensors import SafetensorError

MEMORY_ADVICE = "give it less to do at once"
NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # where there is no class for it
LOST_PROCESS = ("gloo", "Connection closed by peer", "Connection reset by peer")
CONNECTION = ("TransportError", "RequestException")  # of the HTTP library, which was requests, then httpx, then httpx2
BAD_DATA = ("DatasetsError", "ArrowException", "YAMLError")  # of libraries that a run may do without


class RunError(RuntimeError):
    """Ends a run on purpose; its message says why, and what to do."""


def explain(error: BaseException, memory_advice: str = MEMORY_ADVICE) -> str | None:
    """What is wrong and what to do, in one line; None for an error that nobody foresaw.

    Args:
        error: any.
        memory_advice: what to try where memory is not enough, for example flags of the program.
    """
    said = one_line(error)
    if is_out_of_memory(error):
        return f"There is not enough memory ({said}); {memory_advice}."
    if isinstance(error, SafetensorError):
        return f"A file of weights is cut off, damaged or no safetensors ({said}); download or write it again."
    if isinstance(error, json.JSONDecodeError) and type(error) is json.JSONDecodeError:
        return f"A file that should hold JSON is damaged ({said}); download or write it again."
    if isinstance(error, UnicodeDecodeError):
        return f"A file that should hold text is not in UTF-8 ({said}); convert it."
    if _is_of(error, CONNECTION):
        return f"The connection to the Hub failed ({said}); check the network and try again."
    if _is_of(error, BAD_DATA):
        return f"A data file cannot be read ({one_line(list(causes(error))[-1])}); check it, or download it again."
    if type(error) is Exception:  # as tokenizers raises them
        return f"A file of a model is damaged, or of an unknown kind ({said}); download it again."
    if isinstance(error, RuntimeError) and _lost_a_process(error):
        return f"Another process of this run has ended, and says why in a message of its own ({said})."
    return said if isinstance(error, ValueError | ImportError | OSError | RunError) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the machine's memory was not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; its kind if it has none."""
    return " ".join(line for line in map(str.strip, str(error).splitlines()) if line) or type(error).__name__


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from, the first of them last."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_of(error: BaseException, classes: tuple[str, ...]) -> bool:
    """Whether a class of one of these names is among the error's, whose library need not be installed."""
    return any(base.__name__ in classes for base in type(error).__mro__)


def _lost_a_process(error: RuntimeError) -> bool:
    known = torch.distributed.is_available() and isinstance(error, torch.distributed.DistError)
    return known or any(sign in str(error) for sign in LOST_PROCESS)
