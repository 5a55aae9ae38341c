"""Prompts from text files, one a line, and from the captions of datasets: on the Hub, in a folder, or in a file."""

from __future__ import annotations

import codecs
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .program import causes

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

MARKED = {  # byte-order marks; UTF-32's goes first, because it begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MARK = "\ufeff"
LINE_END = re.compile(r"\r\n|\r|\n")  # and no other of those at which `str.splitlines` cuts
LONG = 10_000  # characters, more than the tokens of any text encoder hold
CONVERT = "convert it, for example with iconv -f WINDOWS-1252 -t UTF-8"
DATA_FILES: dict[str, tuple[str, dict[str, str]]] = {  # ending -> the builder of `datasets` that reads it
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
TEXT_FILE, TEXT_COLUMN = ".txt", "text"
PLAIN_SPLIT = re.compile(r"[\w.-]+")  # and no slice or sum
READ_AHEAD = {"block_size": 2**16}  # bytes beyond those asked for, instead of millions, as captions lie far apart
SAVED = (("dataset_dict.json",), ("state.json", "dataset_info.json"))  # what `save_to_disk` leaves in a folder
TEXTS = ("string", "large_string", "string_view", "null")
FLAGS = ("--dataset_name", "--caption_column")


def read_prompts(path: Path, flag: str) -> list[str]:
    """The prompts of a text file, one a line, stripped; blank lines are skipped.

    The text is UTF-8, with or without a byte-order mark, or UTF-16 or UTF-32 with one. A line ends at a line feed, at a
    carriage return, or at both.

    Args:
        path: the file.
        flag: the flag that names it, for error messages.

    Raises:
        ValueError: one sentence, if the file is missing, is not text, or holds no prompts.
    """
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise ValueError(f"{flag} {path} {what}; give a text file with one prompt a line.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read ({error.strerror}); give another file.") from error
    prompts = [cleaned(line) for line in LINE_END.split(_decoded(content, f"{flag} {path}"))]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"{flag} {path} holds no prompts; write one a line.")
    warn_of_long(prompts, f"{flag} {path}")
    return prompts


def cleaned(text: str) -> str:
    """A prompt, stripped, without the byte-order mark that joined files contain."""
    return text.strip().removeprefix(MARK).strip()


def warn_of_long(prompts: Sequence[str], source: str) -> None:
    """Warns about prompts that are longer than any text encoder reads."""
    long = [prompt for prompt in prompts if len(prompt) > LONG]
    if long:
        warnings.warn(
            f"{source} holds {len(long)} prompts of more than {LONG:,} characters, the first begins {long[0][:40]!r}; "
            "the text encoders read only their beginning.",
            stacklevel=3,
        )


def _decoded(content: bytes, source: str) -> str:
    encoding = next((name for mark, name in MARKED.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = _lines(content[: error.start].decode(encoding, "ignore"))
        raise ValueError(
            f"{source} is no {encoding.upper()} text, because of the byte 0x{content[error.start]:02x} in line {line}; "
            f"{CONVERT}."
        ) from error
    if "\0" in text:
        line = _lines(text[: text.index("\0")])
        raise ValueError(
            f"{source} holds a NUL character in line {line}, as UTF-16 without a byte-order mark does, and files that "
            "are no text; save it as UTF-8."
        )
    return text


def _lines(before: str) -> int:
    """The number of the line that a text ends in, from 1."""
    return len(LINE_END.split(before))


def read_captions(
    place: str,
    column: str,
    split: str = "train",
    config: str | None = None,
    flags: tuple[str, str] = FLAGS,
    most: int | None = None,
) -> list[list[str]]:
    """The captions of each row that has one, in the dataset's order.

    Of parquet files, in which most image datasets of the Hub are, only the captions are downloaded, kept and decoded.

    Args:
        place: a Hub id; a folder of data files, or one that `save_to_disk` wrote; or a data file.
        column: holds a text, or a list of texts that all describe one picture.
        split: of the dataset, or a slice of one, as `datasets` writes it: `train[:1000]`.
        config: its configuration.
        flags: the flags of the dataset and the column, for error messages.
        most: how many captions are enough; no further rows are read, nor downloaded if possible.

    Returns:
        For each row at least one caption; a warning counts the rows without one.

    Raises:
        ValueError: one sentence, if it cannot be read, or if the column is missing, is no text, or is empty.
    """
    source = f"{flags[0]} {place}"
    is_text = Path(place).is_file() and Path(place).suffix.lower() == TEXT_FILE and split == "train"
    dataset = _read_text(Path(place), flags[0]) if is_text else load_rows(place, split, config, source, column, most)
    return [row for row in captions_of(dataset, column, place, flags, most) if row]


def captions_of(
    dataset: Dataset | IterableDataset, column: str, place: str, flags: tuple[str, str], most: int | None = None
) -> list[list[str]]:
    """As `read_captions`, of a dataset that is loaded; a row without captions keeps its place."""
    if column not in (features := cast(Any, dataset.features)):
        raise ValueError(f"{flags[1]} {column} is not in {place}; its columns are {', '.join(features)}.")
    kind = _kind(features[column])
    if kind not in TEXTS and kind != "Json":
        raise ValueError(f"{flags[1]} {column} of {place} holds {kind}, not text; choose another.")
    rows: list[list[str]] = []
    count = 0
    for i, value in enumerate(_values(dataset, column, f"{flags[0]} {place}")):
        rows.append(list(_texts(value, f"{flags[1]} {column} of {place}", i)))
        count += len(rows[-1])
        if most is not None and count >= most:
            break
    if not count:
        raise ValueError(f"The column {column} of {place} holds no prompts.")
    if blank := rows.count([]):
        warnings.warn(
            f"{blank} of {len(rows)} rows of {place} have no text in {column}; they are left out.", stacklevel=3
        )
    warn_of_long([text for row in rows for text in row], f"{flags[0]} {place}")
    return rows


def _read_text(path: Path, flag: str) -> Dataset:
    """A text file's lines, which `datasets` would cut and clean otherwise."""
    import datasets

    return datasets.Dataset.from_dict({TEXT_COLUMN: read_prompts(path, flag)})


def _values(dataset: Dataset | IterableDataset, column: str, source: str) -> Iterator[Any]:
    """A column, row after row; ValueError if it cannot be read."""
    from datasets import Dataset

    try:
        alone = dataset.select_columns([column])
        yield from alone[:][column] if isinstance(alone, Dataset) else (row[column] for row in alone)
    except Exception as error:  # the libraries raise dozens of kinds
        raise ValueError(f"{source} is damaged ({_reason(error)}); download or write it again.") from error


def load_rows(
    place: str, split: str, config: str | None, source: str, column: str | None = None, most: int | None = None
) -> Dataset | IterableDataset:
    """A dataset, possibly without the columns beside `column`, if one is named; other arguments as `read_captions`.

    Raises:
        ValueError: one sentence about the `source`, a flag and its value, if it cannot be read.
    """
    import datasets

    path = Path(place)
    try:
        if any(all((path / name).is_file() for name in names) for names in SAVED):
            return _pick(datasets.load_from_disk(place), split)
        what = _file(path) if path.is_file() else {"path": place, "name": config}
        found = None if column is None else _column_of_parquet(what, column, split, most)
        if found is None and most is not None and not path.exists() and PLAIN_SPLIT.fullmatch(split):
            stream = datasets.load_dataset(**what, split=split, streaming=True)
            found = stream if stream.features is not None else None  # they are not known of texts, which are small
        return datasets.load_dataset(**what, split=split) if found is None else found
    except Exception as error:  # as above
        raise ValueError(f"{source} cannot be read ({_reason(error)}); check its name, files and split.") from error


def _column_of_parquet(
    what: dict[str, Any], column: str, split: str, most: int | None
) -> Dataset | IterableDataset | None:
    """One column of parquet files, read in place, wherever they are; all columns if it is missing.

    It is cached as `datasets` caches a whole dataset, unless only the first rows are wanted. None if there are other
    files, or if the dataset cannot be reached.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from datasets.packaged_modules.parquet.parquet import Parquet

    try:
        builder = datasets.load_dataset_builder(**what, columns=[column], storage_options={"hf": READ_AHEAD})
    except Exception:  # of other builders, which have no such option
        return None
    if isinstance(builder, Cache):  # there is no network, and an earlier run has read the column
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    if not isinstance(builder, Parquet):
        return None
    streams = builder.as_streaming_dataset()
    if not all(column in stream.features for stream in streams.values()):
        return next(iter(datasets.load_dataset(**what, streaming=True).values()))
    if most is not None and split in streams:
        rows = partial(_rows_of_parquet, builder.config.data_files[split], column)
        return datasets.IterableDataset.from_generator(rows, streams[split].features)
    builder.info.size_in_bytes = None  # of all columns
    builder.download_and_prepare(
        dl_manager=datasets.StreamingDownloadManager(
            builder.dataset_name,
            builder.config.data_dir,
            datasets.DownloadConfig(token=builder.token, storage_options=builder.storage_options),
            builder.base_path,
        )
    )
    return builder.as_dataset(split=split)


def _rows_of_parquet(urls: Sequence[str], column: str) -> Iterator[dict[str, Any]]:
    """One column of parquet files. The reader of `datasets` would still be reading ahead when a short program ends."""
    import fsspec
    import pyarrow.parquet as pq

    for url in urls:
        with fsspec.open(url, "rb", **READ_AHEAD) as file:
            for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(columns=[column], use_threads=False):
                yield from batch.to_pylist()


def _file(path: Path) -> dict[str, Any]:
    """A data file, as arguments of `load_dataset`."""
    if path.suffix.lower() not in DATA_FILES:
        raise ValueError(f"a file has to end in {', '.join([*DATA_FILES, TEXT_FILE])}, and has the split train alone")
    builder, options = DATA_FILES[path.suffix.lower()]
    return {"path": builder, "data_files": {"train": str(path)}, **options}


def _pick(saved: Any, split: str) -> Dataset:
    """One split of what `save_to_disk` wrote; a dataset that was saved alone is the split that it was."""
    if isinstance(saved, dict):
        if split not in saved:
            raise ValueError(f"it has no split {split}, only {', '.join(saved)}")
        return saved[split]
    if split not in ("train", str(saved.split)):
        raise ValueError(f"it has no split {split}, it is {saved.split or 'one alone'}")
    return saved


def _kind(feature: Any) -> str:
    """What a column, or the lists in it, hold: a dtype, or a class of `datasets`."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
    return str(getattr(inner, "dtype", None) or type(inner).__name__)


def _texts(value: Any, source: str, row: int) -> Iterator[str]:
    """The captions of one row; blank ones and None are none."""
    for text in value if isinstance(value, list) else [value]:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{source} holds {type(text).__name__}, not text, in row {row + 1}; choose another.")
        if text is not None and cleaned(text):
            yield cleaned(text)


def _reason(error: BaseException) -> str:
    """The first line of the error's first cause."""
    *_, first = causes(error)
    return (str(first).strip() or type(first).__name__).splitlines()[0]
