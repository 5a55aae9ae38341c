"""Checks that a pipeline's weights are complete and readable, before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import ModelMixin
from safetensors import safe_open
from torch import nn

SAFE, PICKLED = ".safetensors", (".bin", ".ckpt", ".pt", ".pth")
# diffusion_pytorch_model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model-00001-of-00002.safetensors
VARIANT = re.compile(r"^[^.]+\.(?P<variant>[^.]+?)(-\d{5}-of-\d{5})?\.safetensors$")
NAMED = 3  # tensors in an error message


def networks_of(config: Mapping[str, Any]) -> dict[str, type[nn.Module]]:
    """The classes of the networks that a `pipeline_config` names, by component."""
    libraries: dict[Any, Any] = {"diffusers": diffusers, "transformers": transformers}
    lists = {name: entry for name, entry in config.items() if isinstance(entry, list | tuple) and len(entry) > 1}
    entries = {name: entry for name, entry in lists.items() if all(isinstance(word, str) for word in entry)}
    kinds = {name: getattr(libraries.get(entry[0]), entry[1], None) for name, entry in entries.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, nn.Module)}


def check_files(
    what: str, name: str, components: Collection[str], files: Collection[str], variant: str | None, complete: bool
) -> None:
    """Refuses a pipeline whose weights are pickled, or of another variant than the one asked for. Raises ValueError.

    `components` are the folders that hold networks, `files` the paths of all files in it. Components without the
    variant are loaded from their plain files; without any weights they are refused if the pipeline must be `complete`.
    """
    variants_of = {component: _variants(component, files) for component in components}
    available = sorted({each for variants in variants_of.values() for each in variants if each})
    if variant is not None and available and variant not in available:
        raise ValueError(f"The {what} {name} has no files of the variant {variant}; it has {', '.join(available)}.")
    for component, variants in variants_of.items():
        if {variant, None} & variants:
            continue
        pickles = [file for file in files if file.startswith(component + "/") and file.endswith(PICKLED)]
        if variants:
            other = min(map(str, variants))
            raise ValueError(
                f"The {what} {name} has its {component} in the variant {other} only; add --variant {other}, or in "
                f"Python variant={other!r}."
            )
        if pickles:
            raise ValueError(
                f"The {what} {name} has only pickled weights ({pickles[0]}), which can run code and are refused; if "
                f"you trust them, convert them: DiffusionPipeline.from_pretrained({name!r}).save_pretrained('safe')."
            )
        if complete:
            raise ValueError(f"The {what} {name} has no weights of its {component}; save or download it again.")


def _variants(component: str, files: Collection[str]) -> set[str | None]:
    """The variants of a component's safetensors; None is the plain one."""
    names = [file.removeprefix(component + "/") for file in files if file.startswith(component + "/")]
    matches = [VARIANT.match(name) for name in names if name.endswith(SAFE) and "/" not in name]
    return {match and match["variant"] for match in matches}


def check_weights(
    what: str, name: str, config: Mapping[str, Any], folder: Path, variant: str | None, without: Collection[str] = ()
) -> None:
    """Refuses a folder's pipeline if weights are missing, damaged or of another network. Raises ValueError.

    Libraries fill missing weights with random numbers. Nothing is loaded here; only the files' headers are read.
    """
    networks = {part: kind for part, kind in networks_of(config).items() if part not in without}
    files = files_in(folder)
    check_files(what, name, networks, files, variant, complete=True)
    for part, kind in networks.items():
        own = variant if variant in _variants(part, files) else None
        check_network(f"{what} {name}", part, kind, folder / part, own)


def files_in(folder: Path) -> list[str]:
    """The files of a pipeline's components, by their paths in its folder."""
    return [path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.is_file()]


def check_network(whose: str, part: str, kind: Any, folder: Path, variant: str | None = None) -> None:
    """Refuses a network's folder as `check_weights` does. Raises ValueError."""
    stamps = tuple(sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.glob("*")))
    refuse(whose, part, _problem(kind, folder, variant, stamps))


def refuse(whose: str, part: str, problem: str | None) -> None:
    """Raises ValueError if there is a problem."""
    if problem:
        raise ValueError(f"The {whose} cannot be loaded: its {part} {problem}; save or download it again.")


@lru_cache(maxsize=64)
def _problem(kind: Any, folder: Path, variant: str | None, stamps: tuple) -> str | None:
    """What is wrong with a network's files, cached by their sizes and times; None if nothing is."""
    options = {"variant": variant, "use_safetensors": True, "device_map": {"": "meta"}}
    try:
        with quiet():
            _, info = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
        absent = _absent_from_shards(folder, variant)
    except Exception as error:  # libraries raise anything for damaged files
        return f"is damaged ({(str(error).strip().splitlines() or [type(error).__name__])[0].rstrip('.')})"
    return f"lacks {listed(absent)}" if absent else problem_in(kind, info)


def _absent_from_shards(folder: Path, variant: str | None) -> set[str]:
    """Tensors in a sharded network's index that its shards lack; diffusers trusts the index."""
    absent: set[str] = set()
    for index in folder.glob(f"*{SAFE}.index.{variant}.json" if variant else f"*{SAFE}.index.json"):
        places = json.loads(index.read_text())["weight_map"]
        for shard in set(places.values()):
            with safe_open(folder / shard, framework="pt") as file:
                absent |= {name for name, place in places.items() if place == shard} - set(file.keys())
    return absent


def problem_in(kind: type[nn.Module], info: Mapping[str, Any]) -> str | None:
    """What is wrong with a network's weights by the loading info of `from_pretrained`; None if nothing is."""
    if info["missing_keys"]:
        return f"lacks {listed(info['missing_keys'])}"
    if info["mismatched_keys"]:
        return f"has shapes that differ from its config.json, in {listed(key[0] for key in info['mismatched_keys'])}"
    if info["unexpected_keys"] and issubclass(kind, ModelMixin):  # text encoders may have unused heads
        return f"has tensors that its config.json does not have, {listed(info['unexpected_keys'])}"
    return None


def listed(names: Any) -> str:
    """The first few names, and the number of others."""
    ordered = sorted(names)
    others = f" and {len(ordered) - NAMED} others" if len(ordered) > NAMED else ""
    return ", ".join(ordered[:NAMED]) + others


@contextmanager
def quiet() -> Iterator[None]:
    """Limits diffusers and transformers to reporting errors, without progress bars."""
    levels = [library.utils.logging.get_verbosity() for library in (diffusers, transformers)]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    try:
        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        yield
    finally:
        for library, level in zip((diffusers, transformers), levels, strict=True):
            library.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
