"""Parts of a cache that all processes make in turns, and read; an interrupted making goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from .cache_parts import whole_parts, write_part


def shared_parts(
    folder: Path,
    parts: list[range],
    make: Callable[[range], dict[str, Tensor]],
    accelerator: Accelerator,
    what: str,
) -> list[dict[str, Tensor]]:
    """All parts, of which those are made that are missing or damaged. Every process must call.

    Args:
        folder: the cache.
        parts: the numbers of the images in each.
        make: makes a part, on the CPU.
        accelerator: of the run.
        what: the images, for the progress bar and for messages.

    Raises:
        OSError: if a part cannot be written, or if the processes share no cache.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _make_missing(folder, parts, make, accelerator, what)
        accelerator.wait_for_everyone()
        found = whole_parts(folder)
    except OSError as error:
        raise OSError(
            f"The cache of {what} in {folder} could not be written ({error}); free some space there, or name another "
            "folder with --cache_dir."
        ) from error
    if len(found) < len(parts):
        raise OSError(f"The cache of {what} in {folder} lacks parts; name a --cache_dir that all processes share.")
    return [load_file(found[number]) for number in range(len(parts))]


def _make_missing(
    folder: Path,
    parts: list[range],
    make: Callable[[range], dict[str, Tensor]],
    accelerator: Accelerator,
    what: str,
) -> None:
    """Each process makes equally many, perhaps one of them twice, because shards of weights need all processes."""
    found = whole_parts(folder, f"The cache of {what} is damaged in {{path}}; that part is made anew.")
    missing = [number for number in range(len(parts)) if number not in found]
    (missing,) = broadcast_object_list([missing])
    size, index = accelerator.num_processes, accelerator.process_index
    total, left = sum(map(len, parts)), sum(len(parts[number]) for number in missing)
    disable = not accelerator.is_main_process or not parts
    with tqdm(total=total, initial=total - left, desc=what, disable=disable) as bar:
        for start in range(0, len(missing), size):
            turn = missing[start : start + size]
            number = turn[min(index, len(turn) - 1)]
            write_part(folder, number, make(parts[number]))
            bar.update(sum(len(parts[number]) for number in turn))
